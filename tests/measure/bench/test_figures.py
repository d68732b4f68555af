"""The arithmetic of the benchmark against runs made up by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvllm.measure.bench.figures import (
    Lengths,
    Trace,
    by_context,
    effective_ratio,
    run_figures,
    steady_figures,
    steady_window,
    step_times,
    timeline,
)


def trace(usage: list[float], running: list[int], waiting: list[int], step_s: float = 0.5) -> Trace:
    """One step every `step_s`, each running request gets a token in it."""
    num_steps = len(usage)
    return Trace(
        time=[(i + 1) * step_s for i in range(num_steps)],
        tokens=list(running),
        running=list(running),
        waiting=list(waiting),
        usage=list(usage),
        preempted=[0] * num_steps,
        gaps=[np.full(n, step_s, dtype=np.float32) for n in running],
    )


def test_steady_state_from_the_full_pool_to_the_last_waiting_request() -> None:
    made = trace(usage=[0.2, 0.6, 0.96, 0.9, 0.97, 0.5], running=[4, 4, 4, 3, 3, 3], waiting=[2, 2, 2, 3, 1, 0])
    assert steady_window(made) == (2, 5, "pool")


def test_ample_memory_from_all_running_to_the_first_finish() -> None:
    made = trace(usage=[0.1] * 6, running=[2, 4, 4, 4, 3, 1], waiting=[0] * 6)
    assert steady_window(made) == (1, 4, "seats")


def test_steady_state_begins_after_the_first_wave() -> None:
    made = trace(usage=[0.99] * 6, running=[4] * 6, waiting=[1] * 6)
    assert steady_window(made, first_wave_s=1.5) == (2, 6, "pool")


def test_a_run_cut_off_in_its_first_wave_has_no_steady_state_but_run_figures() -> None:
    made = trace(usage=[0.99] * 6, running=[4] * 6, waiting=[1] * 6)
    with pytest.raises(ValueError, match="max-seconds"):
        steady_figures(made, first_wave_s=np.inf)
    assert run_figures(made, 100, 0).run_tokens_per_s == pytest.approx(24 / 3.0)


def test_figures_of_a_hand_made_run() -> None:
    made = trace(usage=[0.5, 0.96, 0.97, 1.0, 0.9], running=[10, 8, 6, 4, 2], waiting=[0, 2, 4, 1, 0], step_s=0.1)
    made.preempted = [0, 0, 2, 1, 0]
    made.gaps[2] = np.array([0.1] * 5 + [0.7], dtype=np.float32)  # one comes back after it was preempted
    made.gaps[3] = np.array([0.3] * 4, dtype=np.float32)  # a stall that all of them feel
    made.samples = [Lengths(0.1, 10, 1000, 1000), Lengths(0.25, 8, 2000, 1000), Lengths(0.35, 6, 2000, 600)]
    steady = steady_figures(made)
    assert (steady.steady_from_s, steady.steady_s) == (pytest.approx(0.2), pytest.approx(0.2))
    # Steps 2 and 3 lie in the interval, step 1 ends where it starts.
    assert steady.output_tokens_per_s == pytest.approx((6 + 4) / 0.2)
    assert steady.num_running == pytest.approx((8 + 6 + 4) / 3)
    # Sorted: five of 100, four of 300, one of 700; the median lies between the fifth and the sixth.
    assert steady.tbt_p50_ms == pytest.approx(200)
    assert steady.tbt_p99_ms == pytest.approx(300 + 0.91 * 400)
    assert (steady.longest_step_ms, steady.longest_gap_ms) == (pytest.approx(300), pytest.approx(700))
    assert steady.r_eff == pytest.approx(1600 / 4000)
    assert steady.mean_context == pytest.approx(4000 / 14)
    run = run_figures(made, num_kv_blocks=200, num_finished=3)
    assert run.run_tokens_per_s == pytest.approx(30 / 0.5)
    assert run.run_r_eff == pytest.approx(2600 / 5000)
    assert (run.peak_kv_blocks, run.num_preemptions, run.num_finished) == (200, 3, 3)


def test_r_eff_of_one_request_is_its_mean_physical_over_its_mean_logical_length() -> None:
    from kvllm.config import KvConfig
    from kvllm.layout import Geometry

    geometry = Geometry.from_config(KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5), 32)
    assert geometry is not None
    # Prompt of 10: windows from 32 on, so the events are due at 32 + 64 + 32 = 128 and at 192; each frees 32.
    lengths = {127: 127, 128: 96, 191: 159, 192: 128, 250: 186}
    samples = [Lengths(0.0, 1, n, geometry.physical_len(10, n)) for n in lengths]
    assert [s.physical for s in samples] == list(lengths.values())
    assert effective_ratio(samples) == pytest.approx(sum(lengths.values()) / sum(lengths))
    in_all_groups = [replace(s, local=64) for s in samples]
    most = len(lengths) * 64
    assert effective_ratio(in_all_groups) == pytest.approx((sum(lengths.values()) + most) / (sum(lengths) + most))


def test_a_step_takes_what_its_least_delayed_request_waited() -> None:
    gaps = [np.array([0.02, 0.5], dtype=np.float32), np.array([], dtype=np.float32)]
    assert step_times(gaps)[0] == pytest.approx(0.02)
    assert np.isnan(step_times(gaps)[1])


def test_steps_by_context_and_by_time() -> None:
    made = trace(usage=[0.1] * 4, running=[2] * 4, waiting=[0] * 4, step_s=0.5)
    made.gaps = [np.full(2, s, dtype=np.float32) for s in (0.5, 0.5, 0.4, 0.2)]
    made.samples = [Lengths(0.5, 2, 20, 20), Lengths(2.0, 2, 80, 40)]  # contexts 10, 20, 30, 40 at the four steps
    rows = by_context(made, bucket=25)
    assert [(r["context"], r["step_ms"]) for r in rows] == [(12.5, pytest.approx(500)), (37.5, pytest.approx(300))]
    assert rows[1]["output_tokens_per_s"] == pytest.approx(4 / 0.6)
    slices = timeline(made, seconds=1.0)
    assert [(r["time"], r["output_tokens_per_s"]) for r in slices] == [(0, 2), (1, 4), (2, 2)]
    assert slices[2]["r_eff"] == pytest.approx(0.5)
