from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.measure.eval import fidelity
from kvllm.measure.eval.fidelity import (
    DISTANCES,
    EVENTS,
    growth_table,
    measure,
    measure_trace,
    random_like,
    table,
)
from kvllm.measure.eval.sweep import Case, cases
from kvllm.measure.eval.traces import Trace, write_traces
from kvllm.reference import Request, compare, feed, kl_by_row, replay
from kvllm.reference.formats import Fp8
from tests.measure.commands import kvllm
from tests.reference.models import text, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"window_size": 32, "buffer_size": 16, "query_stride": 4, "retention_ratio": 0.5}
TRACES = [Trace("a", text(150), 21), Trace("b", text(200, seed=1), 30), Trace("short", text(60, seed=2), 20)]


def test_the_rows_are_those_of_two_plain_replays():
    model = tiny_model("qwen2")
    entries: list[dict[str, Any]] = [{"method": "kara"}, {"method": "snapkv", "window_size": 48}]
    results = measure(model, TRACES, cases(entries, COMMON))
    assert [r.case.name for r in results] == [
        "kara", "snapkv window_size=48", "random", "recent", "random window_size=48", "recent window_size=48",
    ]  # fmt: skip
    for result in results:
        assert list(result.rows) == ["a", "b"]  # the third ends before its first compression
        for trace in TRACES[:2]:
            full = replay(model, trace.token_ids, trace.num_prompt_tokens, keep_full=True)
            compressed = replay(model, trace.token_ids, trace.num_prompt_tokens, result.case.config, keep_full=True)
            first = 32 + result.case.config.window_size + 16  # both prompts take two blocks
            rows = result.rows[trace.id]
            expected = compare(full, compressed, first)
            assert len(rows.kl) == expected.num_tokens
            # Other shapes of the same float32 matmuls.
            np.testing.assert_allclose(rows.kl, kl_by_row(full, compressed)[first:], atol=1e-4)
            assert rows.kl.mean() == pytest.approx(expected.kl, rel=1e-3) and expected.kl > 1e-3
            assert rows.delta_nll.mean() == pytest.approx(expected.delta_nll, abs=1e-4)
            assert rows.agreed.mean() == pytest.approx(expected.top1_agreement, abs=0.02)
            assert rows.distance[0] == 0 and rows.distance[-1] == len(rows.kl) - 1


def test_a_cache_of_another_precision_is_compared_on_the_rows_of_the_others():
    model, trace = tiny_model("qwen2"), TRACES[0]
    compressed = KvConfig.from_dict(COMMON)
    whole = KvConfig(retention_ratio=1.0)
    chosen = [Case("kara", compressed), Case("whole", whole, "fp8"), Case("kara", compressed, "fp8")]
    plain, fp8, both = measure_trace(model, trace, chosen, 16)
    assert plain is not None and fp8 is not None and both is not None
    assert len(plain.kl) == len(fp8.kl) == len(both.kl)
    full = replay(model, trace.token_ids, trace.num_prompt_tokens, keep_full=True)
    for rows, config in ((fp8, None), (both, compressed)):
        request = Request(model, trace.num_prompt_tokens, config, 16, formats=[Fp8()] * 2)
        expected = kl_by_row(full, feed(request, trace.token_ids, keep_full=True))[-len(rows.kl) :]
        np.testing.assert_allclose(rows.kl, expected, atol=1e-4)
    assert not np.allclose(both.kl, plain.kl, atol=1e-3)
    # Alone, all rows behind the prompt count.
    (alone,) = measure_trace(model, trace, chosen[1:2], 16)
    assert alone is not None and len(alone.kl) == len(trace.token_ids) - 1 - trace.num_prompt_tokens
    np.testing.assert_allclose(alone.kl[-len(fp8.kl) :], fp8.kl, atol=1e-4)


def test_estimates_weigh_rows_and_compare_with_random():
    results = measure(tiny_model("llama"), TRACES[:2], cases([{"method": "kara"}], COMMON))
    kara, random, recent = results
    kl = np.concatenate([r.kl for r in kara.rows.values()])
    assert kara.estimate("kl").value == pytest.approx(kl.mean())
    assert random_like(kara, results) is random and random_like(recent, results) is random
    share = kara.against(random)
    assert share.value == pytest.approx(kl.mean() / random.estimate("kl").value)
    assert share.low <= share.value <= share.high and random.against(random).value == 1
    bins = kara.binned("distance", DISTANCES)
    assert [b["from"] for b in bins] == [0, 64] and sum(b["num_rows"] for b in bins) == len(kl)
    assert sum(b["kl"] * b["num_rows"] for b in bins) / len(kl) == pytest.approx(kl.mean())
    assert table(results).count("\n") == 1 + 3
    # Windows of 32: a row every so many tokens sees one compression more, and starts counting again.
    rows = kara.rows["b"]
    assert list(rows.events) == [1 + d // 32 for d in rows.distance] and list(rows.since_event) == [
        d % 32 for d in rows.distance
    ]
    by_events = kara.binned("events", EVENTS)
    assert [b["from"] for b in by_events] == [1, 2, 4] and by_events[0]["num_rows"] == 64
    assert f"{by_events[0]['kl']:.4f}" in growth_table(results)


def test_too_short_traces_are_refused():
    """What is needed is what is said to be: a text of that length is compressed for one token, a shorter one is not."""
    compared = cases([{"method": "kara"}], COMMON)
    needed = "kara r=0.5, random r=0.5, recent r=0.5: the longest answer has 40 tokens, 62 are needed"
    with pytest.raises(UsageError, match=needed):
        measure(tiny_model("llama"), TRACES[2:], compared)
    with pytest.raises(UsageError, match="has 61 tokens, 62 are needed"):
        measure(tiny_model("llama"), [Trace("a", text(81), 20)], compared)
    assert all(len(r.rows["a"].kl) == 1 for r in measure(tiny_model("llama"), [Trace("a", text(82), 20)], compared))


def test_a_case_that_compresses_nothing_is_refused():
    with pytest.raises(UsageError, match="kara r=1: compresses nothing, so nothing is compared; use --ratios"):
        measure(tiny_model("llama"), TRACES, cases([{"method": "kara", "retention_ratio": 1.0}], COMMON))


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "load_model", lambda folder, dtype, device: tiny_model("llama"))
    write_traces(tmp_path / "traces.jsonl", TRACES)
    kvllm(
        "eval", "fidelity",
        "--traces", str(tmp_path / "traces.jsonl"), "--model", "tiny", "--half", "train", "--device", "cpu",
        "--methods", "kara", "--configs", '{"method": "keydiff"}', "--ratios", "0.5",
        "--common", json.dumps(COMMON), "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg"),
    )  # fmt: skip
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["num_traces"] == 2 and [r["name"] for r in made["results"]] == ["keydiff", "kara", "random", "recent"]
    assert made["results"][0]["config"]["window_size"] == 32
    assert list(made["results"][0]["traces"]) == ["a"]
    assert "| 0.5 " in capsys.readouterr().out
    assert (tmp_path / "out.svg").stat().st_size > 1000
