"""Time of KvLLM's kernels per engine step, from a trace of vLLM's profiler. Needs a CUDA device."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvllm.errors import UsageError

# The Triton kernels of each part. Methods that run in PyTorch cannot be identified.
PARTS = {
    "compression": (
        "_weights_kernel",
        "_log_sums_kernel",
        "_scores_kernel",
        "_select_chunks_kernel",
        "_compact_kernel",
        "_attend_kernel",
        "_fit_kernel",
        "_pack_kernel",
    ),
    "packed_attention": ("_attend_packed_kernel", "_merge_packed_kernel"),
    "store_tokens": ("_store_tokens_kernel",),
    "block_tables": ("_join_kernel",),
}
STEP = "_join_kernel"  # runs once in every step


def profiler_args(folder: Path) -> dict[str, Any]:
    """EngineArgs that make `start_profile` write a trace of GPU kernels to this folder."""
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder),
        "torch_profiler_activities": ["CUDA"],
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
    }
    return {"profiler_config": config}


def read_kernels(folder: Path) -> list[tuple[str, float, float]]:
    """(name, start, duration) of each kernel in the folder's newest trace, in microseconds, sorted by start."""
    traces = sorted(folder.glob("**/*.json*"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise ValueError("vLLM's profiler wrote no trace.")
    raw = traces[-1].read_bytes()
    trace = json.loads(gzip.decompress(raw) if traces[-1].suffix == ".gz" else raw)
    kernels = [e for e in trace["traceEvents"] if e.get("cat") == "kernel"]
    return sorted(((e["name"], float(e["ts"]), float(e["dur"])) for e in kernels), key=lambda k: k[1])


def profile_figures(kernels: list[tuple[str, float, float]]) -> dict[str, Any]:
    """For each part: mean and maximum milliseconds per step, and share of the mean step time.

    A step lasts from one call of the kernel that joins block tables to the next. Raises UsageError for fewer than two.
    """
    begins = np.array([start for name, start, _ in kernels if name == STEP])
    if len(begins) < 3:
        raise UsageError(f"the trace has only {len(begins)} steps with KvLLM; profile more steps.")
    steps = np.diff(begins)
    figures: dict[str, Any] = {"num_steps": len(steps), "step_ms": steps.mean() / 1e3}
    for part, names in PARTS.items():
        mine = [(start, duration) for name, start, duration in kernels if name in names]
        index = np.searchsorted(begins, [start for start, _ in mine], side="right") - 1
        times = np.zeros(len(steps))
        for i, (_, duration) in zip(index, mine, strict=True):
            if 0 <= i < len(steps):
                times[i] += duration / 1e3
        share = times.mean() / figures["step_ms"]
        figures[part] = {"mean_ms": times.mean(), "most_ms": times.max(), "share": share}
    return figures
