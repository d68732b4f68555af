"""Only running requests hold rows of the query bank, whatever the scheduler does. Needs no model.

KVLLM_TRAFFIC=N draws N random schedules for each runner, new ones in every run, in place of the fixed few.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs

from kvllm.config import KvConfig
from kvllm.engine import runner_v2, store_gpu
from kvllm.engine.plugin import register
from kvllm.kernels.block_tables import join_segments_ref
from kvllm.kernels.compact import compact_ref
from kvllm.kernels.store_tokens import store_tokens_ref
from kvllm.kernels.windows import gather_window_ref
from tests.engine.traffic import BLOCK_SIZE, MAX_LEN, PROMPT_KINDS, Arrival, Engine, WorkerV1, WorkerV2

NUM_SCHEDULES = int(os.environ.get("KVLLM_TRAFFIC", "0"))
SIZES: dict[str, Any] = {
    "method": "recent",  # in whose place the worker has its own, and so for the other
    "request_methods": "random",
    "window_size": 2 * BLOCK_SIZE,
    "buffer_size": BLOCK_SIZE,
    "retention_ratio": 0.5,
    "query_stride": 2,
}
CONFIGS = [
    KvConfig(**SIZES),
    KvConfig(history_size=3 * BLOCK_SIZE, **SIZES),
    KvConfig(prompt_budget=BLOCK_SIZE, **SIZES),
    KvConfig(policy="budget", budget_size=2 * BLOCK_SIZE, budget_interval=BLOCK_SIZE, **SIZES),
]

arrivals = st.builds(
    Arrival,
    prompt_kind=st.integers(0, PROMPT_KINDS - 1),
    num_prompt_tokens=st.integers(1, 24),
    max_tokens=st.integers(5, 60),
    ratio=st.sampled_from([None, None, None, 1.0]),
    method=st.sampled_from([None, "recent", "random", "random"]),
    priority=st.integers(0, 2),
)


@dataclass(frozen=True)
class Round:
    """Requests arrive, steps run, and then something may interrupt them."""

    arrivals: list[Arrival]
    num_steps: int
    throttle_prefills: bool  # as between data-parallel engines
    interruption: str | int  # the number of a request is aborted


@dataclass(frozen=True)
class Schedule:
    config: KvConfig
    max_num_seqs: int
    num_blocks: int
    tokens_per_step: int  # beyond one for each seat
    policy: str
    is_async: bool
    rounds: list[Round]
    host_chunks: int = 0  # see `Engine`
    blocks_per_chunk: int = 1


schedules = st.builds(
    Schedule,
    config=st.sampled_from(CONFIGS),
    max_num_seqs=st.integers(2, 4),
    num_blocks=st.integers(12, 22),
    tokens_per_step=st.sampled_from([0, 3, 8, 64]),
    policy=st.sampled_from(["fcfs", "priority"]),
    is_async=st.booleans(),
    rounds=st.lists(
        st.builds(
            Round,
            arrivals=st.lists(arrivals, min_size=1, max_size=3),
            num_steps=st.integers(1, 30),
            throttle_prefills=st.sampled_from([False, False, True]),
            interruption=st.sampled_from(["none", "none", "none", "preempt all", 0, 1, 2]),
        ),
        min_size=3,
        max_size=8,
    ),
)


@pytest.fixture(scope="module")
def vllm_config(model_dir: Path) -> Any:
    made = EngineArgs(
        str(model_dir), dtype="float32", max_model_len=MAX_LEN, enforce_eager=True, skip_tokenizer_init=True
    ).create_engine_config()
    logging.getLogger("vllm.v1.core.block_pool").setLevel(logging.WARNING)
    return made


@pytest.fixture(scope="module", autouse=True)
def without_kernels() -> Iterator[None]:
    """PyTorch references in the place of the kernels, and a process that is the only rank."""
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_v2, "join_segments", join_segments_ref)
        patch.setattr(store_gpu, "gather_window", gather_window_ref)
        patch.setattr(store_gpu, "compact", compact_ref)
        patch.setattr(runner_v2, "store_tokens", store_tokens_ref)
        patch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)
        patch.setattr("vllm.v1.worker.gpu_model_runner.get_pp_group", lambda: type("", (), {"is_last_rank": True}))
        yield


def play(vllm_config: Any, worker: type[WorkerV1] | type[WorkerV2], schedule: Schedule, counts: Counter[str]) -> None:
    """Run all actions, then all requests to their end; the engine checks every step."""
    own = copy.copy(vllm_config)
    own.cache_config, own.scheduler_config = copy.copy(own.cache_config), copy.copy(own.scheduler_config)
    own.cache_config.block_size, own.cache_config.num_gpu_blocks = BLOCK_SIZE, schedule.num_blocks
    own.scheduler_config.max_num_seqs, own.scheduler_config.policy = schedule.max_num_seqs, schedule.policy
    own.scheduler_config.max_num_batched_tokens = schedule.max_num_seqs + schedule.tokens_per_step
    own.scheduler_config.max_num_scheduled_tokens = None
    own.scheduler_config.async_scheduling = schedule.is_async
    engine = Engine(
        own, worker, schedule.config, schedule.num_blocks, schedule.max_num_seqs, schedule.is_async, counts,
        schedule.host_chunks, schedule.blocks_per_chunk,
    )  # fmt: skip
    for each in schedule.rounds:
        for arrival in each.arrivals:
            engine.arrive(arrival)
        for _ in range(each.num_steps):
            engine.step(each.throttle_prefills)
        if each.interruption == "preempt all":
            engine.preempt_all()
        elif isinstance(each.interruption, int):
            engine.abort(each.interruption)
    engine.finish()


@pytest.mark.parametrize("worker", [WorkerV1, WorkerV2], ids=["v1", "v2"])
def test_rows_and_blocks_whatever_happens(
    vllm_config: Any, worker: Any, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[str] = Counter()

    @settings(
        max_examples=NUM_SCHEDULES or 25,
        deadline=None,
        derandomize=not NUM_SCHEDULES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(schedules)
    def draw(schedule: Schedule) -> None:
        play(vllm_config, worker, schedule, counts)

    draw()
    for name, count in counts.items():
        record_property(name, count)
    with capsys.disabled():
        print(f"\n{worker.__name__}:", ", ".join(f"{count} {name}" for name, count in counts.items()))
    # It would prove little if some of it never happened.
    for name in ("requests", "preempted", "resumed", "left out", "aborts", "resets", "events"):
        assert counts[name] > 3, name
