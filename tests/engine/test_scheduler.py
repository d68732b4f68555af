"""The scheduler alone, with synthetic outputs: at every step it holds and frees the blocks that the layout says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvllm.config import KvConfig
from kvllm.engine.admission import NUM_TIMES
from kvllm.engine.metrics import REPORT_INTERVAL, take_report
from kvllm.engine.scheduler import MOST_STEPS_KEPT, KvAsyncScheduler
from kvllm.engine.spec import KvSpec, will_cut_prompt
from kvllm.engine.usage import KvUsage
from kvllm.layout import ceil_div

BLOCK_SIZE = 16
SIZES = {"window_size": 64, "buffer_size": 16, "retention_ratio": 0.5}


@pytest.fixture
def make(model_dir: Path) -> Callable[..., Any]:
    def scheduler(num_blocks: int, max_num_seqs: int, **kvllm: Any) -> KvAsyncScheduler:
        config = EngineArgs(
            str(model_dir), dtype="float32", max_model_len=1024, enforce_eager=True, block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs, additional_config={"kvllm": SIZES | kvllm},
        ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks = num_blocks
        shape: Any = dict(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
        num_parts = len(KvConfig.from_dict(SIZES | kvllm).parts)
        groups = [KVCacheGroupSpec([f"layer.{part}"], KvSpec(**shape, part=part)) for part in range(num_parts)]
        return KvAsyncScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            log_stats=True,
        )

    return scheduler


def request(
    name: str, num_prompt_tokens: int, max_tokens: int, ratio: float | None = None, first_token: int = 0
) -> Request:
    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    extra = None if ratio is None else {"kv_retention_ratio": ratio}
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
    hasher = get_request_block_hasher(BLOCK_SIZE, hash_fn)
    prompt = list(range(first_token, first_token + num_prompt_tokens))
    return Request(name, prompt, params, None, block_hasher=hasher)


class Steps:
    """Steps of an engine that is always one step ahead of its outputs."""

    def __init__(self, scheduler: KvAsyncScheduler) -> None:
        self.scheduler = scheduler
        self.in_flight: list[tuple[Any, ModelRunnerOutput]] = []

    def step(self) -> None:
        scheduled = self.scheduler.schedule()
        names = list(scheduled.num_scheduled_tokens)
        tokens = [[] if self.scheduler.requests[n].is_prefill_chunk else [7] for n in names]
        output = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, tokens)
        self.in_flight.append((scheduled, output))
        if len(self.in_flight) == 2 or not names:
            self.scheduler.update_from_output(*self.in_flight.pop(0))


def check_blocks(scheduler: KvAsyncScheduler, before: dict[str, int]) -> None:
    """Check the blocks of every request in the last step; before: computed tokens of each before that step."""
    for name, computed in before.items():
        if (running := scheduler.requests.get(name)) is None or running.num_computed_tokens <= computed:
            continue
        found = scheduler._compressed(name)
        for part, manager in enumerate(scheduler.kv_managers):
            live = [b for b in manager.req_to_blocks[name] if not b.is_null]
            shared = [b for b in live if b.block_hash is not None]
            if found is None:
                assert len(live) == ceil_div(running.num_computed_tokens, BLOCK_SIZE)
                continue
            geometry, prompt = found[0].groups[part], running.num_prompt_tokens
            new = running.num_computed_tokens - computed
            assert len(live) == ceil_div(geometry.physical_len(prompt, computed) + new, BLOCK_SIZE)
            assert len(shared) <= (0 if will_cut_prompt(*found) else prompt // BLOCK_SIZE)
            assert len(shared) == manager.num_cached_block.get(name, 0)


def check_tokens(scheduler: KvAsyncScheduler, before: dict[str, int]) -> None:
    """The reported number of held tokens is that of the layout."""
    removed = logical = 0
    for running in scheduler.running:
        found, computed = scheduler._compressed(running.request_id), running.num_computed_tokens
        logical += computed
        if found is not None:  # the events are those of the last step that computed anything
            geometry, prompt = found[0], running.num_prompt_tokens
            started = before.get(running.request_id, 0)
            events = geometry.num_events(prompt, started if computed > started else computed - 1)
            removed += sum(group.num_removed(prompt, events) for group in geometry.groups)
    stats, num_parts = scheduler.engine_stats(), len(scheduler.kv_managers)
    assert stats["num_logical_tokens"] == logical
    assert stats["num_physical_tokens"] == logical - removed // num_parts  # of several parts the mean


@pytest.mark.parametrize(
    "kvllm",
    [
        {},
        {"history_size": 64},
        {"prompt_budget": 64},
        {"policy": "budget", "budget_size": 128, "budget_interval": 32, "prompt_budget": 32},
        {"retention_ratio": {"0-14": 0.7, "15-29": 0.3}, "history_size": 128, "prompt_budget": 64},
    ],
    ids=["window", "history", "prompt", "budget", "layers"],
)
def test_blocks_follow_the_layout_whatever_happens(make: Callable[..., Any], kvllm: dict[str, Any]) -> None:
    """Random arrivals and aborts, compressed or not, in a pool so small that requests preempt each other."""
    num_parts = len(KvConfig.from_dict(SIZES | kvllm).parts)
    rng, scheduler = random.Random(0), make(59 * num_parts + 1, 16, **kvllm)
    steps, num_left, ratios = Steps(scheduler), 40, [None, 0.25, 1.0] if num_parts == 1 else [None, 1.0]
    while num_left or scheduler.has_unfinished_requests():
        if num_left and rng.random() < 0.3:
            num_left -= 1
            length, most = rng.choice([1, 16, 33, 100, 200]), rng.choice([5, 100, 400])
            scheduler.add_request(request(str(num_left), length, most, rng.choice(ratios)))
        if scheduler.requests and rng.random() < 0.01:
            scheduler.finish_requests(rng.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
        before = {name: r.num_computed_tokens for name, r in scheduler.requests.items()}
        before |= {r.request_id: 0 for r in scheduler.waiting}
        running = {r.request_id for r in scheduler.running}
        steps.step()
        check_blocks(scheduler, {name: n for name, n in before.items() if name in running})
        check_tokens(scheduler, before)
    stats = scheduler.engine_stats()
    assert stats["num_preemptions"] > 0 and stats["num_windows_compressed"] > 10
    assert (stats["num_prompts_cut"] > 0) == ("prompt_budget" in kvllm)
    assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
    assert stats["num_physical_tokens"] == 0
    assert not any(m.tokens_evicted or m._progress or m.all_cached for m in scheduler.kv_managers)
    assert sum(m.total_tokens_evicted for m in scheduler.kv_managers) == stats["num_blocks_freed"] * BLOCK_SIZE
    assert stats["num_tokens_evicted"] == stats["num_blocks_freed"] * BLOCK_SIZE // num_parts
    if not kvllm:
        kept, evicted = stats["num_tokens_kept"], stats["num_tokens_evicted"]
        assert kept + evicted == stats["num_windows_compressed"] * SIZES["window_size"]


def test_periodic_reports_miss_nothing(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, clock = make(200, 4), [0.0]
    monkeypatch.setattr("kvllm.engine.metrics.time.monotonic", lambda: clock[0])
    scheduler.add_request(request("0", 20, 300))
    steps, reports = Steps(scheduler), []
    make_stats = scheduler.make_stats

    def kept_stats(*args: Any, **kwargs: Any) -> Any:
        made = make_stats(*args, **kwargs)
        reports.append(take_report(made))
        return made

    monkeypatch.setattr(scheduler, "make_stats", kept_stats)
    while scheduler.has_requests():
        clock[0] += REPORT_INTERVAL / 8
        steps.step()
    sent = [report for report in reports if report is not None]
    assert len(reports) // 8 <= len(sent) <= len(reports) // 8 + 5
    assert sent[0]["query_bank_rows_used"] == 1 and sent[-1]["query_bank_rows_used"] == 0
    windows = scheduler.engine_stats()["num_windows_compressed"]
    assert windows > 2 and sum(report.get("windows_compressed", 0) for report in sent) == windows


def test_headroom_of_mixed_ratios_equals_that_of_each_request(make: Callable[..., Any]) -> None:
    """Also while texts are computed in chunks: those of resumed requests count as if they were there."""
    scheduler = make(2000, 16)
    for i in range(12):
        scheduler.add_request(request(str(i), 10 + 9 * i, 300 + i, (None, 0.25, 0.75, 1.0)[i % 4]))
    steps = Steps(scheduler)
    for number in range(250):
        if number == 120:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        steps.step()
        found = [scheduler._compressed(running.request_id) for running in scheduler.running]
        rows = [(*each, max(each[1].num_computed_tokens, each[1].num_tokens - 1)) for each in found if each is not None]
        assert len(rows) == 9
        totals = []
        for time in np.linspace(0, 64, NUM_TIMES + 1, dtype=np.int64).tolist():
            lasting = [(g, r, soon + time) for g, r, soon in rows if soon + time <= r.num_prompt_tokens + r.max_tokens]
            totals.append(sum(ceil_div(g.physical_len(r.num_prompt_tokens, at), BLOCK_SIZE) for g, r, at in lasting))
        now = sum(ceil_div(g.physical_len(r.num_prompt_tokens, r.num_computed_tokens), BLOCK_SIZE) for g, r, _ in rows)
        assert scheduler._blocks_ahead() == max(totals) - now


@pytest.mark.parametrize("shared", [False, True])
def test_requests_admitted_in_one_step_leave_each_other_room(make: Callable[..., Any], shared: bool) -> None:
    """Each grows from two blocks to five: in 24 there is room for four, or five that share a block of their prompt."""
    scheduler = make(25, 16)
    steps = Steps(scheduler)
    if shared:
        scheduler.add_request(request("first", 20, 1))
        steps.step()
    for i in range(10):
        scheduler.add_request(request(str(i), 20, 60, first_token=0 if shared else 100 * i))
    steps.step()
    assert len(scheduler.running) == 4 + shared
    while scheduler.has_unfinished_requests():
        steps.step()
    assert scheduler.num_preemptions == 0


def test_a_request_reserves_growth_only_while_others_run_and_before_it_holds_blocks(make: Callable[..., Any]) -> None:
    """Otherwise a request that waits for more than it needs could wait for ever: nothing would become free."""
    scheduler = make(200, 4)
    (manager,), steps = scheduler.kv_managers, Steps(scheduler)
    for i in range(2):
        scheduler.add_request(request(str(i), 20, 200, first_token=100 * i))

    def asked(name: str) -> int:
        return manager.get_num_blocks_to_allocate(name, 20, [], 0, 0, 20, apply_admission_cap=True)

    assert asked("0") == 2  # nothing runs
    steps.step()
    assert len(scheduler.running) == 2 and asked("0") == 0  # it holds them already
    scheduler.add_request(request("2", 20, 200, first_token=500))
    assert asked("2") == 2 + 4  # it grows by an interval of 64 tokens
    assert asked("2") == 2 + 4  # asking again changes nothing


def test_a_text_that_is_computed_again_is_counted_before_it_has_blocks(make: Callable[..., Any]) -> None:
    scheduler = make(200, 4)
    scheduler.add_request(request("0", 20, 500))
    steps = Steps(scheduler)
    for _ in range(400):
        steps.step()
    held = scheduler._num_used_blocks()
    scheduler.reset_prefix_cache(reset_running_requests=True)
    steps.step()
    assert scheduler._num_used_blocks() < held / 2
    assert scheduler._num_used_blocks() + scheduler._blocks_ahead() >= held


def test_headroom_is_worked_out_only_where_a_request_can_be_admitted(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make(2000, 4)
    calls: list[int] = []
    original = scheduler._blocks_ahead

    def counting() -> int:
        calls.append(len(scheduler.running))
        return original()

    monkeypatch.setattr(scheduler, "_blocks_ahead", counting)
    for i in range(6):
        scheduler.add_request(request(str(i), 20, 30))
    steps = Steps(scheduler)
    while scheduler.has_unfinished_requests():
        steps.step()
    assert calls == [0, 0]  # all six waiting; the last two, once the first four have ended


def test_headroom_is_worked_out_once_in_a_block_of_decoding(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve requests that started at different times fill a pool, and others wait for blocks."""
    scheduler = make(12 * 12 + 1, 40)
    steps, calls, errors = Steps(scheduler), [0], []
    original, headroom = scheduler._blocks_ahead, scheduler._headroom

    def counting() -> int:
        calls[0] += 1
        return original()

    def checking() -> int:
        found = headroom()
        errors.append(found - original())
        return found

    monkeypatch.setattr(scheduler, "_blocks_ahead", counting)
    monkeypatch.setattr(scheduler, "_headroom", checking)
    for i in range(24):
        scheduler.add_request(request(str(i), 20, 400))
        for _ in range(7):
            steps.step()
    while scheduler.has_unfinished_requests():
        steps.step()
    assert len(errors) > 250 and calls[0] < len(errors) / 4  # anew whenever the running requests change
    assert np.abs(errors).max() <= 16 and abs(np.mean(errors)) < 2


def test_kept_headroom_ages_in_steps_that_do_not_ask_for_it(make: Callable[..., Any]) -> None:
    scheduler = make(2000, 4)
    steps = Steps(scheduler)
    for i in range(4):
        scheduler.add_request(request(str(i), 20, 60))
    steps.step()
    scheduler.headroom.keep(["others"], 1000)
    for _ in range(MOST_STEPS_KEPT - 1):
        steps.step()
    assert scheduler.headroom.now(["others"], 0) == 1000
    steps.step()
    assert scheduler.headroom.now(["others"], 0) is None and len(scheduler.running) == 4


def test_a_request_that_only_our_headroom_keeps_waiting_is_counted(make: Callable[..., Any]) -> None:
    """Five requests of at most 10 blocks, in 24 blocks and then in 200."""
    scheduler = make(24, 16)
    for i in range(5):
        scheduler.add_request(request(str(i), 20, 200))
    steps = Steps(scheduler)
    while scheduler.has_unfinished_requests():
        steps.step()
    assert 0 < scheduler.engine_stats()["num_held_back"] <= 4
    roomy = make(200, 16)
    for i in range(5):
        roomy.add_request(request(str(i), 20, 200))
    steps = Steps(roomy)
    while roomy.has_unfinished_requests():
        steps.step()
    assert roomy.engine_stats()["num_held_back"] == 0


def test_the_front_end_works_out_what_the_scheduler_did(make: Callable[..., Any]) -> None:
    """Answers that end just before, at and just after an event; event 0 is 80 tokens after the prompt's blocks."""
    scheduler = make(200, 1)
    steps = Steps(scheduler)
    for i, (prompt, generated) in enumerate([(16, 1), (16, 80), (16, 81), (16, 82), (16, 146), (20, 300), (1, 95)]):
        before = scheduler.engine_stats()
        scheduler.add_request(request(str(i), prompt, generated))
        while scheduler.has_requests():
            steps.step()
        after = scheduler.engine_stats()
        usage = KvUsage()
        usage.add(scheduler.geometries.of_ratio(0.5), prompt, generated)
        assert usage.compressions == after["num_windows_compressed"] - before["num_windows_compressed"]
        assert usage.evicted_tokens == after["num_tokens_evicted"] - before["num_tokens_evicted"]
        assert usage.kept_tokens + usage.evicted_tokens == prompt + generated - 1
