from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kvllm.config import PRESETS, KvConfig
from kvllm.errors import UsageError
from kvllm.layout import Geometry
from kvllm.measure.eval import frontier
from kvllm.measure.eval.frontier import Log, grid, measure_recall, measure_traces, random_like
from kvllm.measure.eval.held_bytes import full_bytes, held_bytes
from kvllm.measure.eval.recall import Item, Needle
from kvllm.measure.eval.sweep import Case
from kvllm.measure.eval.traces import Trace, write_traces
from tests.measure.commands import kvllm
from tests.measure.eval.test_recall import Characters
from tests.reference.models import text, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Blocks of 16 hold 48 tokens of heads of 16 in 4 bits.
COMMON = {"window_size": 96, "buffer_size": 16, "query_stride": 4}
TRACES = [Trace("a", text(260), 21), Trace("b", text(300, seed=1), 30)]
QWEN = {
    "head_dim": 128,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "hidden_size": 1536,
}


def small_grid(**changes: Any) -> list[Case]:
    options: dict[str, Any] = dict(
        methods=["kara", "random"], caches=["auto", "fp8"], bits=[16, 4], sizes=[1 / 6, 1 / 3], block_size=16,
        head_dim=16, common=COMMON,
    )  # fmt: skip
    return grid(**(options | changes))


def test_the_presets_are_sizes_of_the_grid():
    cases = grid(["kara"], ["auto"], [4], [0.25, 0.125, 0.0625, 0.5], 16, 128, {})
    assert [case.config for case in cases[1:]] == [KvConfig(**PRESETS[name]) for name in ("4x", "8x", "16x")]
    assert cases[0].config == KvConfig()


def test_settings_of_one_size_take_the_same_bytes():
    config = tiny_config("qwen2", **QWEN)
    assert full_bytes(config) == 28672
    found: dict[float, list[tuple[Case, float]]] = {}
    for case in grid(["kara", "random"], ["auto", "fp8"], [16, 8, 4], [0.125, 0.25], 16, 128, {}):
        if case.config.enabled and case.config.retention_ratio != 0.3:
            held = held_bytes(case, config, 16, [(256, 8192)])
            found.setdefault(held.old / 28672, []).append((case, held.life))
    assert {size: len(cases) for size, cases in found.items()} == {0.125: 9, 0.25: 9}
    for cases in found.values():
        # Prompt and newest tokens take half in fp8.
        assert len({life for case, life in cases if case.cache == "fp8"}) == 1
        assert min(life for case, life in cases if case.cache == "auto") > max(
            life for case, life in cases if case.cache == "fp8"
        )


def test_bytes_over_life_are_those_held_at_each_step():
    config, case = tiny_config("qwen2", **QWEN), Case("8x", KvConfig(**PRESETS["8x"]))
    geometry = Geometry.from_config(case.config, 16, packed_tokens=56)
    assert geometry is not None
    held = [geometry.physical_len(100, n) for n in range(100, 1100)]
    expected = 28672 * sum(held) / sum(range(100, 1100))
    assert held_bytes(case, config, 16, [(100, 1000)]).life == pytest.approx(expected)
    assert held_bytes(Case("", KvConfig(retention_ratio=1.0), "fp8"), config, 16, []).old == 28672 / 2
    # 4 of 28 layers stay in 16 bits; the others take 64 + 2 and 64 + 4 bytes a head.
    turboquant = held_bytes(Case("", KvConfig(retention_ratio=1.0), "turboquant_4bit_nc"), config, 16, [])
    assert turboquant.life == 4 * 1024 + 24 * 2 * 134


def test_a_stopped_run_continues_and_gives_the_same_as_one_call(tmp_path):
    model, cases, about = tiny_model("llama"), small_grid(), {"model": "tiny"}
    at_once, stopped = Log(None, about), Log(tmp_path / "log", about)
    measure_traces(model, TRACES, cases, 16, at_once)
    calls = iter([True])
    measure_traces(model, TRACES, cases, 16, stopped, goes_on=lambda: next(calls, False))
    assert {name for point in stopped.points.values() for name in point.traces} == {"a"}
    resumed = Log(tmp_path / "log", about)
    measure_traces(model, TRACES, cases, 16, resumed)
    assert {key: point.traces for key, point in resumed.points.items()} == {
        key: point.traces for key, point in at_once.points.items()
    }
    assert len((tmp_path / "log").read_text().splitlines()) == 1 + 2 * len(cases)
    with pytest.raises(UsageError, match="belongs to another run"):
        Log(tmp_path / "log", {"model": "other"})
    points = list(at_once.points.values())
    kara = next(p for p in points if p.case.name == "kara" and p.case.config.survivor_bits == 4)
    random = random_like(kara, points)
    assert random is not None and random.case.config.method == "random"
    assert random.case.config.retention_ratio == kara.case.config.retention_ratio
    assert kara.against(random).value == pytest.approx(kara.kl().value / random.kl().value)


def test_only_facts_that_the_full_cache_recalls_count(monkeypatch):
    item = Item(100, 0.5, 0, Needle("x", "1"), text(160), 21)
    whole = [Case("whole cache", KvConfig(retention_ratio=1.0), "fp8")]
    for correct, expected in ((True, [{"100/0.5/0"}]), (False, [set()])):
        log = Log(None, {})
        monkeypatch.setattr("kvllm.measure.eval.recall.Answer.correct", correct)
        measure_recall(tiny_model("qwen3"), Characters(), [item], whole, 16, log)
        assert [set(point.recalled) for point in log.points.values()] == expected


def test_the_command_writes_table_json_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "load_model", lambda folder, dtype, device: tiny_model("llama"))
    write_traces(tmp_path / "traces.jsonl", TRACES)
    files = [str(tmp_path / f"out.{end}") for end in ("json", "md", "svg", "png")]
    for plot in files[2:]:
        kvllm(
            "eval", "frontier", "--traces", str(tmp_path / "traces.jsonl"), "--model", "tiny", "--device", "cpu",
            "--methods", "kara,random", "--caches", "auto,fp8", "--bits", "4", "--sizes", "0.3333",
            "--common", json.dumps(COMMON), "--log", str(tmp_path / "log"),
            "--json", files[0], "--markdown", files[1], "--plot", plot,
        )  # fmt: skip
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["task"] == "frontier" and made["half"] is None
    sizes = [result["bytes_per_old_token"] for result in made["results"]]
    assert sizes == sorted(sizes) and len(sizes) == 1 + 3 + 3
    (fp8,) = [r for r in made["results"] if r["cache"] == "fp8" and r["config"]["retention_ratio"] == 1.0]
    assert fp8["bytes_per_old_token"] == made["full_bytes_per_token"] / 2 and fp8["kl"]["value"] > 0
    assert set(fp8["traces"]) == {"a", "b"} and fp8["kl_against_random"] is None
    assert "whole cache" in capsys.readouterr().out and "<svg" in (tmp_path / "out.svg").read_text()
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_an_unknown_precision_is_refused():
    with pytest.raises(UsageError, match="--caches int2: use auto, fp8, turboquant_k8v4"):
        small_grid(caches=["auto", "int2"])
    assert replace(small_grid()[-1].config).method == "random"


def test_a_line_that_a_kill_cut_off_is_measured_again(tmp_path):
    path, about, case = tmp_path / "log", {"model": "tiny"}, Case("kara", KvConfig())
    log = Log(path, about)
    log.add(frontier.TRACE, case, "a", [1, 2.0, 1.0])
    whole = path.read_text()
    log.add(frontier.TRACE, case, "b", [1, 2.0, 1.0])
    path.write_text(path.read_text()[:-9])
    resumed = Log(path, about)
    assert set(resumed.point(case).traces) == {"a"} and path.read_text() == whole
    resumed.add(frontier.TRACE, case, "b", [1, 3.0, 1.0])
    assert set(Log(path, about).point(case).traces) == {"a", "b"}
    path.write_text(whole[:5])
    assert not Log(path, about).points and path.read_text().count("kind") == 1


@pytest.mark.parametrize("line", ["{", "5", "{}", '{"kind": "trace", "name": "a"}'])
def test_a_log_of_something_else_is_refused(tmp_path, line):
    (tmp_path / "log").write_text(line + "\n")
    with pytest.raises(UsageError, match="--log .*: not what `kvllm eval frontier` writes"):
        Log(tmp_path / "log", {})
