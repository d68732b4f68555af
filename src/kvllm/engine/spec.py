"""Block accounting: vLLM's full-attention cache, in which compression frees the middle of a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvllm.compression.blocks import close_gap, peak_allocator_blocks
from kvllm.engine.settings import kernel_block_size, kv_config, num_late_events, packed_tokens
from kvllm.layout import Geometry, RequestGeometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

# The geometry and vLLM's object of a request, by its id; None if it is not compressed, or gone.
RequestLookup = Callable[[str], "tuple[RequestGeometry, Request] | None"]


@dataclass(frozen=True, kw_only=True)
class KvSpec(FullAttentionSpec):
    """Full attention over a cache whose generated part is compressed.

    part: the part that the layer belongs to (`KvConfig.parts`)
    """

    part: int = 0

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge the specs of one part's layers; layers of different parts never share a KV cache group."""
        parts = {getattr(spec, "part", None) for spec in specs}
        assert len(parts) == 1, "layers of different parts are compressed differently"
        return replace(super().merge(specs), part=specs[0].part)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        uniform = super().is_uniform_with_collection(kv_cache_specs)
        return uniform and all(getattr(spec, "part", None) == self.part for spec in kv_cache_specs.values())

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the longest request with a prompt of one token; vLLM refuses to start with a smaller pool.

        A request that is not compressed, or has a long prompt, can need more, and is refused on arrival.
        """
        geometry = None
        if (config := kv_config(vllm_config)) is not None:
            block_size, part = kernel_block_size(vllm_config), config.parts[self.part]
            geometry = Geometry.from_config(part, block_size, packed_tokens=packed_tokens(vllm_config))
        if geometry is None:
            return super().max_memory_usage_bytes(vllm_config)
        length, late = vllm_config.model_config.max_model_len, num_late_events(vllm_config)
        return peak_allocator_blocks(geometry, 1, length, self.block_size, late) * self.page_size_bytes


def will_cut_prompt(geometry: RequestGeometry, request: Request) -> bool:
    """Whether the request's prompt is cut if the request reaches max_tokens: then it must not share prompt blocks."""
    prompt = request.num_prompt_tokens
    return geometry.prompt_shape(prompt) is not None and geometry.num_events(prompt, prompt + request.max_tokens) > 0


@dataclass
class Progress:
    """The state of a compressed request from its first allocation until its blocks are freed.

    Precomputed, since every step checks every request for events.
    """

    geometry: Geometry
    request: Request
    next_event: int  # computed tokens at which the next event is due
    num_shared_blocks: int  # prompt blocks that enter the prefix cache
    num_events: int = 0  # events whose blocks are freed
    num_evicted: int = 0  # tokens that these events evicted

    @classmethod
    def start(cls, geometry: Geometry, request: Request, block_size: int) -> Progress:
        """block_size: the allocator's"""
        prompt = request.num_prompt_tokens
        num_shared = 0 if will_cut_prompt(geometry, request) else prompt // block_size
        return cls(geometry, request, geometry.event_at(prompt, 0), num_shared)


class Admission(NamedTuple):
    """A waiting request that asked for blocks.

    num_shared: blocks of its prompt that it shares with requests that hold them
    num_blocks: further ones for the text that it has
    growth:     the most that it will hold beyond these within an interval
    owed:       those that requests admitted before it in the same step have yet to take
    """

    request_id: str = ""
    num_shared: int = 0
    num_blocks: int = 0
    growth: int = 0
    owed: int = 0


class KvManager(FullAttentionManager):
    """Frees the blocks that events emptied, and keeps generated tokens of compressed requests out of the prefix cache.

    A request's list of blocks keeps one entry per logical block: first the prefix segment's blocks, then null blocks in
    place of freed ones, then the tail segment's. So slot mappings and allocation stay vLLM's own.
    """

    def __init__(self, kv_cache_spec: KvSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.part = kv_cache_spec.part
        self._lookup: RequestLookup = lambda request_id: None
        self._num_late = 0
        self._others_run: Callable[[], bool] = lambda: False
        self._progress: dict[str, Progress | None] = {}  # by request id; None if it is not compressed
        self.total_events = 0
        self.total_blocks_freed = 0
        self.total_prompts_cut = 0
        self.total_tokens_kept = 0
        self.total_tokens_evicted = 0
        self.tokens_evicted = 0  # of the requests that hold blocks now
        self._last_admission = Admission()
        self.all_cached: set[str] = set()  # ids of requests of which no further block will enter the prefix cache

    def bind(self, lookup: RequestLookup, num_late: int, others_run: Callable[[], bool]) -> None:
        """Give the manager what it needs of the scheduler.

        lookup:     of geometries
        num_late:   from `num_late_events`
        others_run: whether any request runs. Where none does, nothing becomes free, and a request that waits for more
                    than it needs would wait for ever
        """
        self._lookup, self._num_late, self._others_run = lookup, num_late, others_run

    def _find(self, request_id: str) -> Progress | None:
        if request_id not in self._progress:
            found = self._lookup(request_id)
            if found is None:
                self._progress[request_id] = None
            else:
                geometry, request = found
                self._progress[request_id] = Progress.start(geometry.groups[self.part], request, self.block_size)
        return self._progress[request_id]

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks of every event up to the one that the step being scheduled begins with.

        The worker compacts before that step's forward pass, and runs steps in order: whichever request gets these
        blocks, in this step or a later one, writes them after the event, even if earlier steps are still in flight. A
        request that still lacks blocks is preempted, so it never misses an event that freed its blocks.
        (vLLM waits for processed tokens because of KV connectors, of which the only one served here copies in the order
        of the device (`engine/offloading.py`), and because new blocks may be zeroed before a step's events. In models
        with recurrent layers they are, so there we wait as well. A finished request, for which a connector has this
        called once more, begins no step: `pop_blocks_for_free` frees what is left.)
        """
        if (progress := self._find(request_id)) is not None and not progress.request.is_finished():
            late = self._num_late > 0
            self._free_events(progress, processed_computed_tokens - 1 if late else progress.request.num_computed_tokens)

    def _free_events(self, progress: Progress, num_computed_tokens: int) -> None:
        while progress.next_event <= num_computed_tokens:
            geometry, request, event = progress.geometry, progress.request, progress.num_events
            self.total_prompts_cut += event == 0 and will_cut_prompt(geometry, request)
            blocks = self.req_to_blocks[request.request_id]
            freed = close_gap(blocks, self._null_block, geometry, request.num_prompt_tokens, event, self.block_size)
            self.block_pool.free_blocks(reversed(freed))  # the newest first, as vLLM frees a request
            self.total_blocks_freed += len(freed)
            self.total_events += 1
            self._count_tokens(progress, event)
            progress.num_events += 1
            progress.next_event = geometry.event_at(request.num_prompt_tokens, progress.num_events)

    def _count_tokens(self, progress: Progress, event: int) -> None:
        geometry, prompt_len = progress.geometry, progress.request.num_prompt_tokens
        evicted = geometry.num_evicted(prompt_len, event)
        prompt = geometry.prompt_shape(prompt_len) if event == 0 else None
        self.total_tokens_kept += geometry.shape(event).num_kept + (prompt.num_kept if prompt else 0)
        self.total_tokens_evicted += evicted
        self.tokens_evicted += evicted
        progress.num_evicted += evicted

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.all_cached.discard(request_id)
        if (progress := self._progress.pop(request_id, None)) is not None:
            # Counts an event of the last step; the step that would begin at the present length was never scheduled.
            self._free_events(progress, progress.request.num_computed_tokens - 1)
            self.tokens_evicted -= progress.num_evicted
        return super().pop_blocks_for_free(request_id)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Admission counts the compressed size of a text, also of one that is resumed, not its length.

        While other requests run, it also counts those that this one and the ones admitted right before it will take
        soon, which the scheduler's headroom does not know of yet.
        """
        growth = 0
        if apply_admission_cap and (progress := self._find(request_id)) is not None:
            peak = self._peak(progress, num_tokens)
            most = progress.request.num_prompt_tokens + progress.request.max_tokens
            growth = self._peak(progress, max(num_tokens, min(num_tokens + progress.geometry.interval, most))) - peak
            num_tokens = min(num_tokens, peak * self.block_size)
        num_blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        # vLLM also asks what requests that were admitted before have yet to take.
        if not apply_admission_cap or request_id in self.req_to_blocks:
            return num_blocks
        previous, last = self._last_admission, self._last_admission.request_id
        owed = previous.owed
        if last != request_id and last in self.req_to_blocks:
            taken = len(self.req_to_blocks[last]) - previous.num_shared
            owed += max(0, previous.num_blocks + previous.growth - taken)
        num_shared = sum(block.ref_cnt > 0 for block in new_computed_blocks)
        self._last_admission = Admission(request_id, num_shared, num_blocks, growth, owed)
        return num_blocks + growth + owed if self._others_run() else num_blocks

    def _peak(self, progress: Progress, num_tokens: int) -> int:
        prompt = progress.request.num_prompt_tokens
        return peak_allocator_blocks(progress.geometry, prompt, num_tokens, self.block_size, self._num_late)

    def take_last_admission(self) -> tuple[str, int]:
        """The last waiting request that asked for blocks since the previous call, and how many; else ("", 0)."""
        taken, self._last_admission = self._last_admission, Admission()
        return taken.request_id, taken.num_blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Cache only full prompt blocks, and only if the prompt stays whole: survivors will overwrite the others."""
        if (progress := self._find(request.request_id)) is not None:
            num_blocks = progress.num_shared_blocks
            if self.num_cached_block.get(request.request_id, 0) >= num_blocks:
                return  # the case in every decoding step
            num_tokens = min(num_tokens, num_blocks * self.block_size)
        super().cache_blocks(request, num_tokens, *args, **kwargs)


# The built-in specs first: vLLM registers them only while its registry is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(KvSpec, KvManager, uniform_type_base_spec=FullAttentionSpec)
