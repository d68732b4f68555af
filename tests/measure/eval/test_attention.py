from __future__ import annotations

import json

import pytest
import torch

from kvllm.config import KvConfig
from kvllm.measure.eval import attention
from kvllm.measure.eval.attention import PLACES, SCORES, later_attention, measure, seen_by, table, window_at
from kvllm.measure.eval.traces import Trace, write_traces
from kvllm.reference import Request, feed
from tests.measure.commands import kvllm
from tests.reference.models import text, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = KvConfig(window_size=32, buffer_size=16, query_stride=4, retention_ratio=0.5)
TRACES = [Trace("a", text(150), 21), Trace("b", text(200, seed=1), 30), Trace("short", text(90, seed=2), 20)]


def test_a_window_is_what_the_method_is_shown_at_its_compression():
    model, trace = tiny_model("llama"), TRACES[1]
    full = Request(model, trace.num_prompt_tokens, max_queries=200)
    feed(full, trace.token_ids)
    window, num_kept = window_at(full, 32, 80, CONFIG, 16)
    assert num_kept == 16 and window.num_tokens == 32
    expected = torch.stack([layer.keys[32:64] for layer in full.layers])
    assert torch.equal(window.keys, expected) and int(window.positions[0, 0, 0]) == 32
    newest = full.layers[0].queries[79].unflatten(0, (window.num_kv_heads, -1))
    stored = window.grouped_queries()[0][:, :, int(window.query_positions.argmax())]
    assert torch.equal(stored[:, 0], newest[:, 0])  # the first head of a group asks at the newest token


def test_later_queries_give_all_of_their_attention_to_the_text():
    model, trace = tiny_model("llama"), TRACES[0]
    full = Request(model, trace.num_prompt_tokens, max_queries=200)
    feed(full, trace.token_ids)
    everything = later_attention(full, 0, 120, range(100, 120))
    torch.testing.assert_close(everything.sum(-1), torch.ones(everything.shape[:2]))
    part = later_attention(full, 32, 32, range(100, 120))
    assert torch.equal(part, everything[..., 32:64])


def test_figures_lie_between_random_and_the_best_choice():
    result = measure(tiny_model("llama"), TRACES, CONFIG, later_tokens=32)
    assert list(result.windows) == ["a", "b"]  # nothing comes after the compression in the third
    assert [len(made) for made in result.windows.values()] == [2, 3]
    for made in result.windows.values():
        for window in made:
            assert window.even == 0.5 < window.best <= 1 and 0 < window.earlier < 1
            assert set(window.covered) == set(SCORES) and all(0 < c <= window.best for c in window.covered.values())
            assert len(window.later) == PLACES and sum(window.later) == pytest.approx(1)
            assert all(sum(shares) == pytest.approx(1, abs=1e-4) for shares in window.weights.values())
    shown = table(result)
    assert "the best choice" in shown and "| random" in shown and "come from queries before the key" in shown
    with pytest.raises(ValueError, match="no trace has a window and 500 tokens"):
        measure(tiny_model("llama"), TRACES, CONFIG, later_tokens=500)


def test_old_keys_are_seen_more_often():
    model, trace = tiny_model("llama"), TRACES[1]
    full = Request(model, trace.num_prompt_tokens, max_queries=200)
    feed(full, trace.token_ids)
    window, _ = window_at(full, 32, 80, CONFIG, 16)
    seen = seen_by(window)
    assert (seen.diff() <= 0).all() and seen[0] > seen[-1] > 0
    first, last = (
        attention.by_place(attention.accumulated(window))[0],
        attention.by_place(attention.accumulated(window))[-1],
    )
    assert first > last


def test_the_command_writes_figures_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "load_model", lambda folder, dtype, device: tiny_model("llama"))
    write_traces(tmp_path / "traces.jsonl", TRACES)
    sizes = {"window_size": 32, "buffer_size": 16, "query_stride": 4, "retention_ratio": 0.5}
    kvllm(
        "eval", "attention", "--traces", str(tmp_path / "traces.jsonl"), "--model", "tiny", "--device", "cpu",
        "--later", "32", "--common", json.dumps(sizes), "--json", str(tmp_path / "a.json"),
        "--plot", str(tmp_path / "a.svg"),
    )  # fmt: skip
    made = json.loads((tmp_path / "a.json").read_text())
    assert made["covered"].keys() == SCORES.keys() and made["even"] == 0.5 and len(made["traces"]) == 2
    assert "attention of later queries" in capsys.readouterr().out and (tmp_path / "a.svg").stat().st_size > 1000
