"""The whole benchmark on a tiny model, and its output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvllm.measure.bench.spec import BenchSpec, EngineJob, Run
from kvllm.measure.bench.throughput import COLUMNS, bench_throughput, compare, run_job, table, why


def test_ratios_are_to_stock_at_the_same_concurrency() -> None:
    def row(config: str, concurrency: int, speed: float, r_eff: float = 1.0) -> dict[str, object]:
        speeds = {"output_tokens_per_s": speed, "run_tokens_per_s": speed / 2}
        return {"config": config, "concurrency": concurrency, "r_eff": r_eff, **speeds}

    rows = [row("stock", 4, 100), row("stock", 8, 150), row("kara:0.3", 8, 300, 0.4)]
    rows.append({"config": "kara:0.3", "concurrency": 4, "error": "broke"})
    compare(rows)
    assert [r.get("ratio") for r in rows] == [1.0, 1.0, 2.0, None]
    assert rows[2]["of_bound"] == pytest.approx(2.0 * 0.4)
    lines = table(rows).splitlines()
    assert len(lines) == 6 and len(set(map(len, lines))) == 1
    assert lines[0].split()[1] == "config" and lines[5].count(" - ") == len(COLUMNS) - 2


def test_the_reason_of_a_crash_is_found_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO starting\nValueError: window_size=104: must be a multiple\n  at x\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert why(log) == "ValueError: window_size=104: must be a multiple"
    log.write_text("killed\n\n")
    assert why(log) == "killed"


def test_a_worker_that_dies_is_reported_for_each_of_its_runs(tmp_path: Path) -> None:
    runs = [Run("kara:0.3", n, {"retention_ratio": 0.3}) for n in (4, 8)]
    job = EngineJob("no-such-plugin", {"retention_ratio": 0.3}, runs)
    made = run_job(BenchSpec(model="tiny"), job, tmp_path, tmp_path / "out.json", tmp_path / "log")
    assert [(r["config"], r["concurrency"]) for r in made["rows"]] == [("kara:0.3", 4), ("kara:0.3", 8)]
    assert all("no-such-plugin" in r["error"] for r in made["rows"])


@pytest.mark.engine
def test_stock_and_compressed_with_a_short_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    spec = BenchSpec(
        model="tiny",
        config=["stock", "kara:0.5:window_size=64,buffer_size=32"],
        concurrency=[6],
        num_requests=8,
        prompt_len=20,
        output_len=230,
        num_gpu_blocks=25,
        block_size=32,
        dtype="float32",
        enforce_eager=True,
        warmup_seconds=0.2,
        max_seconds=60,
    )
    bench_throughput(spec, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    stock, kara = written["rows"]
    for row in (stock, kara):
        assert row["num_finished"] == 8 and row["bound"] == "pool"
        assert 0.9 * 24 <= row["peak_kv_blocks"] <= row["num_kv_blocks"] == 24
        assert row["run_tokens_per_s"] * row["run_s"] == pytest.approx(8 * 230)
        assert sum(s["output_tokens_per_s"] for s in row["timeline"]) == pytest.approx(8 * 230)
    assert stock["r_eff"] == 1.0 and stock["num_preemptions"] > 0
    assert 0.5 < kara["r_eff"] < 1.0 and kara["num_running"] > stock["num_running"]
    # The windows due at 128 and 192 of 250 tokens, less what was preempted and done again.
    assert kara["kvllm"]["num_windows_compressed"] >= 2 * 8
    assert kara["kvllm"]["free_kv_blocks"] == 24
    assert [e["num_kv_blocks"] for e in written["engines"]] == [24, 24]
