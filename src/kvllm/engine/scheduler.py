"""vLLM's schedulers with compression: they know each request's geometry, and end prefill chunks at its events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from kvllm.compression.blocks import blocks_held
from kvllm.engine.admission import NUM_TIMES, Headroom, most_ahead
from kvllm.engine.cache_groups import checked_groups, compressed_block_size, only_hashed
from kvllm.engine.metrics import Report, add_report, metric_values
from kvllm.engine.offloading import offer_prompt_only
from kvllm.engine.settings import Geometries, kv_config, num_late_events
from kvllm.engine.spec import KvManager, will_cut_prompt
from kvllm.engine.startup import summary
from kvllm.engine.stats import EngineStats, take_seconds
from kvllm.layers import Recurrent
from kvllm.layout import ceil_div

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from kvllm.layout import IntArray, RequestGeometry

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers

MOST_STEPS_KEPT = 16  # for which the result of `_blocks_ahead` is kept

# A scheduler for the type checker; at run time the classes below combine the mixin with one.
Base: Any = Scheduler if TYPE_CHECKING else object
# Requests by the id() of their geometry: of each the prompt's length, the tokens computed, those that soon will be,
# and max_tokens.
ByGeometry = dict[int, tuple["RequestGeometry", list[tuple[int, int, int, int]]]]


class CompressionMixin(Base):
    """Adds compression to a scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = kv_config(self.vllm_config)
        assert config is not None, "the KvLLM scheduler runs only if KvLLM is configured"
        coordinator = self.kv_cache_manager.coordinator
        self.groups = checked_groups(self.vllm_config, self.kv_cache_config)
        self.geometries = Geometries.of_engine(self.vllm_config)
        # The compressed groups' block size; with recurrent layers vLLM's own `block_size` can be a multiple of it.
        self.kv_block_size = compressed_block_size(self.kv_cache_config, self.geometries.block_size, len(config.parts))
        self.num_late = num_late_events(self.vllm_config)
        self.kv_managers = [m for m in coordinator.single_type_managers if isinstance(m, KvManager)]
        for manager in self.kv_managers:
            manager.bind(self._compressed, self.num_late, lambda: bool(self.running))
        # The other groups' managers do not know that generated tokens of compressed requests have no hashes. Those of
        # recurrent layers also cache states between two blocks.
        recurrent = isinstance(self.groups.local, Recurrent)
        all_cached = None if recurrent else self.kv_managers[0].all_cached
        coordinator.cache_blocks = only_hashed(coordinator.cache_blocks, self.hash_block_size, all_cached)
        self.peak_used_blocks = 0
        self.num_preemptions = 0
        self.num_held_back = 0
        self.last_held_back = ""
        self.compression_seconds = 0.0
        self.report = Report()
        self.was_connector_reset = False  # since the last step
        pages = self.kv_managers[0].kv_cache_spec.page_size_bytes
        num_blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is the null block
        geometry = self.geometries.of_ratio(config.mean_ratio)
        logger.info("%s", summary(self.vllm_config, config, geometry, num_blocks, pages, self.kv_block_size))
        self.own_watermark_blocks = self.kv_cache_manager.watermark_blocks
        # Of few steps also where blocks are large: a block too many or too few per request is then much of the pool.
        self.headroom = Headroom(min(self.kv_block_size, MOST_STEPS_KEPT))
        # Makes vLLM call `_mamba_block_aligned_split` for every chunk. vLLM uses it to end prefill chunks, including
        # those of resumed requests, where it keeps recurrent states.
        self.aligns_states = bool(vars(self)["need_mamba_block_aligned_split"])
        self.need_mamba_block_aligned_split = True

    def _compressed(self, request_id: str) -> tuple[RequestGeometry, Request] | None:
        request = self.requests.get(request_id)
        if request is None:
            return None
        geometry = self.geometries.of(request.sampling_params)
        return None if geometry is None else (geometry, request)

    def add_request(self, request: Request) -> None:
        geometry = self.geometries.of(request.sampling_params)
        if geometry is not None:
            # Only the prompt has been hashed so far. Without hashes of generated tokens the request neither shares
            # blocks that it will overwrite, nor finds, when it resumes, another request's blocks and overwrites them.
            request._block_hasher = None
            if will_cut_prompt(geometry, request):
                request.skip_reading_prefix_cache = True  # it will overwrite prompt blocks, so it must not share any
        super().add_request(request)
        if geometry is not None and self.connector is not None:
            offer_prompt_only(self.connector, request)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empty host memory too where running requests are preempted, and first.

        They may be resumed in the next step, which also reports them as preempted, and vLLM's connector asserts that
        none of these is being loaded. It also asserts that it is emptied once between two steps.
        """
        done = True
        if self.connector is not None and (reset_running_requests or reset_connector):
            done = self.was_connector_reset or self.reset_connector_cache()
            self.was_connector_reset, reset_connector = True, False
        return super().reset_prefix_cache(reset_running_requests, reset_connector) and done

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """End a chunk at the next event, so that a resumed request attends to the same cache as the first time."""
        if self.aligns_states:
            num_new_tokens = super()._mamba_block_aligned_split(
                request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens
            )
        if num_new_tokens <= 1:  # decoding: the next event is at least one token away
            return num_new_tokens
        geometry = self.geometries.of(request.sampling_params)
        if geometry is None:
            return num_new_tokens
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        most = geometry.max_chunk(request.num_prompt_tokens, start)
        if num_new_tokens <= most:
            return num_new_tokens
        return chunk_of_states(start, most, self.kv_block_size) if self.aligns_states else most

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.headroom.next_step()
        # A request whose prompt was loaded from host memory waits in the second of these queues.
        waiting = self.waiting or self.kv_holding_waiting
        may_admit = waiting and len(self.running) < self.max_num_active_reqs
        if may_admit:
            # vLLM's own watermark for admission: blocks that stay free unless nothing else runs.
            self.kv_cache_manager.watermark_blocks = max(self.own_watermark_blocks, self._headroom())
            self._take_last_admission()
        output = super().schedule(*args, **kwargs)
        self.was_connector_reset = False
        if may_admit:
            self._count_held_back()
        self.peak_used_blocks = max(self.peak_used_blocks, self._num_used_blocks())
        return output

    def _take_last_admission(self) -> tuple[str, int]:
        """The last waiting request that asked for blocks, and how many in all compressed groups; else ("", 0)."""
        taken = [manager.take_last_admission() for manager in self.kv_managers]
        return taken[0][0], sum(num_blocks for _, num_blocks in taken)

    def _count_held_back(self) -> None:
        """Count the waiting request, once, if stock vLLM would have admitted it in this step."""
        asked, num_blocks = self._take_last_admission()
        request = self.requests.get(asked)
        if asked == self.last_held_back or request is None or request.status == RequestStatus.RUNNING:
            return
        if num_blocks + self.own_watermark_blocks <= self.kv_cache_manager.block_pool.get_num_free_blocks():
            self.num_held_back += 1
            self.last_held_back = asked

    def _headroom(self) -> int:
        """`_blocks_ahead`, worked out once in a few steps while the same compressed requests decode.

        Other requests take blocks that it does not foresee, and so would seem to have taken those that it does.
        """
        holding = *self.running, *self.kv_holding_waiting
        used, key = self._num_used_blocks(), [self.num_preemptions, *(request.request_id for request in holding)]
        ahead = self.headroom.now(key, used)
        if ahead is None:
            ahead = self._blocks_ahead()
            if self.running and not any(map(self._grows_unforeseen, holding)):
                self.headroom.keep(key, used + ahead)
        return ahead

    def _grows_unforeseen(self, request: Request) -> bool:
        decodes = request.status == RequestStatus.RUNNING and not request.is_prefill_chunk
        return not decodes or self.geometries.of(request.sampling_params) is None

    def _blocks_ahead(self) -> int:
        """Blocks that running requests will need over the next interval.

        What is known of a text, as that of a resumed request, is computed within a few steps: the interval begins after
        it.
        """
        by_geometry: ByGeometry = {}  # equal geometries are the same object
        for request in self.running:
            if (geometry := self.geometries.of(request.sampling_params)) is not None:
                _, lengths = by_geometry.setdefault(id(geometry), (geometry, []))
                computed = request.num_computed_tokens
                soon = max(computed, request.num_tokens - 1)
                lengths.append((request.num_prompt_tokens, computed, soon, request.max_tokens))
        if not by_geometry:
            return 0
        made = [(geometry.groups, np.array(lengths, np.int64).T) for geometry, lengths in by_geometry.values()]
        prompt, computed, soon, most = np.concatenate([lengths for _, lengths in made], axis=1)

        def held(steps: IntArray) -> IntArray:
            """steps, and the result: [any, num_reqs]"""
            parts, first, size = [], 0, self.kv_block_size
            for groups, (prompt, _, soon, _) in made:
                at = soon + steps[:, first : first + len(prompt)]
                full = sum(blocks_held(group, prompt, at, size) for group in groups)
                parts.append(self.groups.num_full // len(groups) * full + self.groups.local_blocks_held(at, size))
                first += len(prompt)
            return np.concatenate(parts, axis=1)

        due = held(np.zeros((1, len(soon)), np.int64)) - held((computed - soon)[None])
        ahead = max(self.kv_block_size, *(geometry.interval for geometry, _ in by_geometry.values()))
        num_times = max(NUM_TIMES, ahead // self.kv_block_size)
        return max(0, int(due.sum()) + most_ahead(held, prompt + most - soon, ahead, num_times))

    def _num_used_blocks(self) -> int:
        pool = self.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block

    def engine_stats(self, reset_peak: bool = False) -> EngineStats:
        """Statistics since the engine started; `reset_peak` restarts the peak."""
        pool, managers = self.kv_cache_manager.block_pool, self.kv_managers
        num_logical_tokens = sum(request.num_computed_tokens for request in self.running)
        stats = EngineStats(
            block_size=self.kv_block_size,
            num_kv_blocks=pool.num_gpu_blocks - 1,
            free_kv_blocks=pool.get_num_free_blocks(),
            peak_kv_blocks=self.peak_used_blocks,
            # Events happen in all groups of layers at once; token counts can differ, so they are means over the groups.
            num_windows_compressed=managers[0].total_events,
            num_blocks_freed=sum(m.total_blocks_freed for m in managers),
            num_prompts_cut=managers[0].total_prompts_cut,
            num_tokens_kept=sum(m.total_tokens_kept for m in managers) // len(managers),
            num_tokens_evicted=sum(m.total_tokens_evicted for m in managers) // len(managers),
            num_held_back=self.num_held_back,
            num_preemptions=self.num_preemptions,
            num_running=len(self.running),
            num_logical_tokens=num_logical_tokens,
            num_physical_tokens=num_logical_tokens - sum(m.tokens_evicted for m in managers) // len(managers),
            compression_seconds=self.compression_seconds,
        )
        if reset_peak:
            self.peak_used_blocks = self._num_used_blocks()
        return stats

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        self.compression_seconds += take_seconds(model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics of a step, now and then with our report."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self.report.is_due(bool(self.running)):
            add_report(stats, self.report.next(metric_values(self.engine_stats(), self.max_num_running_reqs)))
        return stats

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        self.num_preemptions += 1
        super()._preempt_request(*args, **kwargs)


def chunk_of_states(start: int, num_new_tokens: int, block_size: int) -> int:
    """The length of a chunk of at most `num_new_tokens` that ends at a block boundary, or in the block it starts in.

    vLLM keeps the state at the end of a chunk for the block in which it ends, so a chunk may not cross a boundary and
    end inside the next block.
    """
    end = start + num_new_tokens
    if start % block_size:
        return min(end, ceil_div(start, block_size) * block_size) - start
    return max(end // block_size * block_size - start, 0) or num_new_tokens


class KvScheduler(CompressionMixin, Scheduler):
    """The synchronous scheduler with compression."""


class KvAsyncScheduler(CompressionMixin, AsyncScheduler):
    """The asynchronous scheduler with compression."""
