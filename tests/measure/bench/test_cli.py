"""The options of `kvllm bench`, up to what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvllm.errors import UsageError
from kvllm.measure.bench import throughput
from kvllm.measure.bench.spec import BenchSpec
from tests.measure.commands import kvllm


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BenchSpec, Path | None]]:
    """What `kvllm bench throughput` would have measured."""
    seen: list[tuple[BenchSpec, Path | None]] = []

    def bench(spec: BenchSpec, json_file: Path | None, plot_file: Path | None) -> dict[str, Any]:
        seen.append((spec, json_file))
        return {"rows": []}

    monkeypatch.setattr(throughput, "bench_throughput", bench)
    return seen


def test_flags_and_a_spec_say_the_same(measured: list[tuple[BenchSpec, Path | None]], tmp_path: Path) -> None:
    wanted = {"model": "tiny", "config": ["stock", "kara:0.5"], "concurrency": [4, 8], "stagger": True, "seconds": 1.5}
    wanted |= {"engine_args": {"kv_cache_dtype": "fp8"}}
    kvllm(
        "bench", "throughput", "tiny", "--config", "stock", "--config", "kara:0.5", "--concurrency", "4",
        "--concurrency", "8", "--stagger", "--seconds", "1.5", "--engine-args", '{"kv_cache_dtype": "fp8"}',
    )  # fmt: skip
    kvllm("bench", "throughput", "--spec", json.dumps(wanted), "--json", str(tmp_path / "out.json"))
    (tmp_path / "spec.json").write_text(json.dumps(wanted))
    kvllm("bench", "throughput", "--spec", str(tmp_path / "spec.json"))
    assert [spec for spec, _ in measured] == [BenchSpec(**wanted)] * 3  # type: ignore[arg-type]
    assert [out for _, out in measured] == [None, tmp_path / "out.json", None]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tiny", "--spec", "{}"], "--spec replaces all other options, so model cannot"),
        (["--spec", "nowhere.json"], "--spec nowhere.json: neither a JSON object nor an existing file"),
        (["--spec", '{"model": '], "not valid JSON"),
        (["--spec", '{"concurency": [4]}'], "no option 'concurency'"),
        (["tiny", "--engine-args", "{"], "--engine-args {: not valid JSON"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(
    measured: list[tuple[BenchSpec, Path | None]], arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("{", r"\{")):
        kvllm("bench", "throughput", *arguments)
    assert not measured


def test_a_plot_without_the_extra_is_refused_before_the_run(
    measured: list[tuple[BenchSpec, Path | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvllm.measure.extras.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"matplotlib, which is not installed; install: uv pip"):
        kvllm("bench", "throughput", "tiny", "--plot", "out.png")
    assert not measured
    kvllm("bench", "throughput", "tiny")
    assert len(measured) == 1
