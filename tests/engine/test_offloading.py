"""Prompts go to host memory and come back, whatever the scheduler does: its half of vLLM's connector is real.

KVLLM_TRAFFIC=N draws N random schedules, new ones in every run, in place of the fixed few.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.test_rows import CONFIGS, NUM_SCHEDULES, play, schedules, vllm_config, without_kernels  # noqa: F401
from tests.engine.traffic import WorkerV2

offloaded = st.builds(
    replace,
    schedules,
    config=st.sampled_from([config for config in CONFIGS if not config.prompt_budget]),
    host_chunks=st.sampled_from([3, 40]),
    blocks_per_chunk=st.sampled_from([1, 1, 2]),
)


def test_prompts_come_back_whatever_happens(
    vllm_config: Any, record_property: Any, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    counts: Counter[str] = Counter()

    @settings(
        max_examples=NUM_SCHEDULES or 20,
        deadline=None,
        derandomize=not NUM_SCHEDULES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(offloaded)
    def draw(schedule: Any) -> None:
        play(vllm_config, WorkerV2, schedule, counts)

    draw()
    for name, count in counts.items():
        record_property(name, count)
    with capsys.disabled():
        print("\noffloading:", ", ".join(f"{count} {name}" for name, count in counts.items()))
    for name in ("preempted", "resumed", "aborts", "resets", "events", "blocks stored", "blocks loaded"):
        assert counts[name] > 3, name
