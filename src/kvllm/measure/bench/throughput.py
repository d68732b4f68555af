"""Compare stock vLLM and KvLLM on the same requests, one engine process after another.

kvllm bench throughput qwen3-8b --config stock --config kara:0.3 --concurrency 64
python -m kvllm bench throughput --spec '{"model": "qwen3-8b", "concurrency": [64]}' --json out.json
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvllm.measure.bench.shapes import SHAPES, write_shape
from kvllm.measure.bench.spec import STOCK, BenchSpec, EngineJob, engine_jobs
from kvllm.measure.environment import commit
from kvllm.measure.tables import markdown

START_S = 900.0  # for an engine to load, compile and capture
Row = dict[str, Any]

# Heading, key, format.
COLUMNS: Sequence[tuple[str, str, str]] = (
    ("config", "config", ""),
    ("in flight", "concurrency", ""),
    ("tokens/s", "output_tokens_per_s", ".0f"),
    ("x stock", "ratio", ".3f"),
    ("of bound", "of_bound", ".3f"),
    ("run tok/s", "run_tokens_per_s", ".0f"),
    ("x stock", "run_ratio", ".3f"),
    ("running", "num_running", ".1f"),
    ("peak blocks", "peak_kv_blocks", ""),
    ("of", "num_kv_blocks", ""),
    ("preempted", "num_preemptions", ""),
    ("TBT p50 ms", "tbt_p50_ms", ".2f"),
    ("p99", "tbt_p99_ms", ".2f"),
    ("max step", "longest_step_ms", ".1f"),
    ("r_eff", "r_eff", ".3f"),
    ("bound", "bound", ""),
    ("steady s", "steady_s", ".0f"),
    ("run s", "run_s", ".0f"),
)


def bench_throughput(spec: BenchSpec, json_path: Path | None = None, plot_path: Path | None = None) -> dict[str, Any]:
    """Measure, print a line after each run and the table at the end; returns the content of the JSON file."""
    result: dict[str, Any] = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "spec": spec.to_dict(),
        "engines": [],
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="kvllm-bench-") as folder:
        model_dir = write_shape(spec.model, Path(folder) / "model") if spec.model in SHAPES else Path(spec.model)
        for number, job in enumerate(engine_jobs(spec)):
            log = json_path.with_suffix(f".{number}.log") if json_path else Path(folder) / f"{number}.log"
            made = run_job(spec, job, model_dir, Path(folder) / f"{number}.json", log)
            result["engines"].append(made.get("engine"))
            for row in made["rows"]:
                rows.append(row)
                compare(rows)
                print(" ".join(cells(row)), flush=True)
            result["rows"] = rows
            if json_path:
                json_path.write_text(json.dumps(result, indent=1))
    print(table(rows), flush=True)
    for row in rows:
        if "profile" in row:
            print(f"{row['config']}, {row['concurrency']} in flight: {profile_line(row['profile'])}", flush=True)
        if "error" in row:
            print(f"{row['config']}, {row['concurrency']} in flight: {row['error']}", flush=True)
    if plot_path:
        from kvllm.measure.bench.plot import plot

        plot(result, plot_path)
    return result


def run_job(spec: BenchSpec, job: EngineJob, model_dir: Path, out: Path, log: Path) -> dict[str, Any]:
    """Run one worker process. If it fails, the missing runs are reported with its error."""
    job_file = out.with_suffix(".job.json")
    job_file.write_text(json.dumps({**asdict(job), "spec": spec.to_dict(), "model_dir": str(model_dir)}))
    command = [sys.executable, "-m", "kvllm.measure.bench.worker", str(job_file), str(out)]
    environment = {**os.environ, **spec.environment(), "VLLM_PLUGINS": job.plugins}
    limit = START_S + len(job.runs) * (spec.max_seconds + spec.warmup_seconds + 120)
    with log.open("w") as stream:
        # A new session, so that killing its process group also kills the engine core.
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stream.write(f"\nno end after {limit:.0f} s\n")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    made: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
    for run in job.runs[len(made["rows"]) :]:
        made["rows"].append({"config": run.label, "concurrency": run.concurrency, "error": why(log)})
    return made


def why(log: Path) -> str:
    """The first error in a log, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "Engine core initialization failed" not in line]
    return (errors or lines or ["the worker said nothing"])[0 if errors else -1][-500:]


def compare(rows: list[Row]) -> None:
    """Add to each row its ratio to the first stock row of the same concurrency.

    of_bound: that ratio against 1 / r_eff, which is what a request's smaller share of the pool allows
    """
    stock = {r["concurrency"]: r for r in reversed(rows) if r["config"] == STOCK and "error" not in r}
    for row in rows:
        base = stock.get(row["concurrency"])
        if base and "run_tokens_per_s" in row:
            row["run_ratio"] = row["run_tokens_per_s"] / base["run_tokens_per_s"]
        if base and "output_tokens_per_s" in row:
            row["ratio"] = row["output_tokens_per_s"] / base["output_tokens_per_s"]
            row["of_bound"] = row["ratio"] * row["r_eff"]


def cells(row: Row) -> list[str]:
    return [format(row[key], spec) if key in row else "-" for _, key, spec in COLUMNS]


def table(rows: list[Row]) -> str:
    return markdown([heading for heading, _, _ in COLUMNS], [cells(row) for row in rows])


def profile_line(profile: dict[str, Any]) -> str:
    parts = [
        f"{part} {each['mean_ms']:.3f} ms a step ({each['share']:.2%}), at most {each['most_ms']:.3f}"
        for part, each in profile.items()
        if isinstance(each, dict)
    ]
    return f"{profile['num_steps']} steps of {profile['step_ms']:.2f} ms: " + "; ".join(parts)
