from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import ModuleType

import pytest

from kvllm.measure.bench.profile import PARTS, profile_figures, read_kernels
from kvllm.measure.bench.throughput import profile_line

STEPS = [("_join_kernel", 1000.0 * i, 10.0) for i in range(4)]


def test_time_of_each_part_by_step() -> None:
    kernels = [
        *STEPS,
        ("_scores_kernel", -50.0, 40.0),  # before the first whole step
        ("_store_tokens_kernel", 100.0, 30.0),
        ("_store_tokens_kernel", 200.0, 30.0),
        ("_scores_kernel", 1900.0, 70.0),
        ("_compact_kernel", 1980.0, 20.0),
        ("flash_attention", 2100.0, 800.0),
        ("_store_tokens_kernel", 3100.0, 500.0),  # after the last
    ]
    figures = profile_figures(kernels)
    assert figures["num_steps"] == 3 and figures["step_ms"] == pytest.approx(1.0)
    assert figures["compression"] == pytest.approx({"mean_ms": 0.03, "most_ms": 0.09, "share": 0.03})
    assert figures["store_tokens"] == pytest.approx({"mean_ms": 0.02, "most_ms": 0.06, "share": 0.02})
    assert figures["block_tables"] == pytest.approx({"mean_ms": 0.01, "most_ms": 0.01, "share": 0.01})
    assert "compression 0.030 ms a step (3.00%), at most 0.090" in profile_line(figures)


def test_a_trace_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 2 steps with KvLLM"):
        profile_figures(STEPS[:2])
    with pytest.raises(ValueError, match="no trace"):
        read_kernels(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_kernels_of_the_newest_trace(zipped: bool, tmp_path: Path) -> None:
    events = [
        {"cat": "kernel", "name": "b", "ts": 5, "dur": 2},
        {"cat": "kernel", "name": "a", "ts": 1.5, "dur": 3},
        {"cat": "gpu_memcpy", "name": "Memcpy", "ts": 2, "dur": 1},
        {"ph": "M", "name": "process_name"},
    ]
    text = json.dumps({"traceEvents": events}).encode()
    name, content = ("t.json.gz", gzip.compress(text)) if zipped else ("t.json", text)
    (tmp_path / name).write_bytes(content)
    assert read_kernels(tmp_path) == [("a", 1.5, 3.0), ("b", 5.0, 2.0)]


def test_every_kernel_of_the_fused_path_belongs_to_a_part() -> None:
    import triton

    from kvllm.kernels import block_tables, compact, select_chunks, store_tokens
    from kvllm.kernels.packed import attend as attend_packed
    from kvllm.kernels.packed import pack
    from kvllm.kernels.refit import attend, fit
    from kvllm.kernels.window_scores import attention, weights

    def names(module: ModuleType) -> set[str]:
        functions = (v for v in vars(module).values() if isinstance(v, triton.runtime.jit.KernelInterface))
        return {f.fn.__name__ for f in functions if f.fn.__name__.endswith("_kernel")}

    modules = (
        block_tables, compact, attend, fit, select_chunks, store_tokens, attention, weights, attend_packed, pack
    )  # fmt: skip
    kernels = [name for module in modules for name in names(module)]
    assert len(set(kernels)) == len(kernels)  # a trace tells kernels apart by name
    assert set(kernels) == {name for part in PARTS.values() for name in part}
