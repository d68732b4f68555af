"""The KV cache groups that vLLM made: finds the compressed ones, and checks the others against the model's config."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from kvllm.engine.settings import groups_of_engine
from kvllm.engine.spec import KvSpec
from kvllm.errors import UsageError
from kvllm.groups import Groups
from kvllm.layers import Local, Recurrent

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

CacheBlocks = Callable[["Request", int], None]  # of vLLM's coordinator, for all groups


def compressed_groups(kv_cache_config: KVCacheConfig, block_size: int, num_parts: int) -> list[int]:
    """The indices of the compressed KV cache groups, one for each part (`KvConfig.parts`), in order.

    Raises UsageError unless each part has exactly one group, with blocks of `block_size` tokens (in a model with
    recurrent layers, of a multiple).
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    larger = any(isinstance(spec, MambaSpec) for spec in specs)
    found = {i: spec.part for i, spec in enumerate(specs) if isinstance(spec, KvSpec)}
    wrong = {
        specs[i].block_size
        for i in found
        if specs[i].block_size != block_size and not (larger and specs[i].block_size % block_size == 0)
    }
    if wrong or sorted(found.values()) != list(range(num_parts)):
        wanted = "one KV cache group" if num_parts == 1 else f"{num_parts} KV cache groups, one for each ratio,"
        raise UsageError(
            f"KvLLM needs all full-attention layers in {wanted} with blocks of {block_size} tokens, but vLLM made "
            f"{', '.join(f'{type(spec).__name__} with blocks of {spec.block_size}' for spec in specs)}."
        )
    return sorted(found, key=lambda i: found[i])


def compressed_block_size(kv_cache_config: KVCacheConfig, block_size: int, num_parts: int) -> int:
    """Allocator block size of the compressed groups, in tokens."""
    first = compressed_groups(kv_cache_config, block_size, num_parts)[0]
    return kv_cache_config.kv_cache_groups[first].kv_cache_spec.block_size


def checked_groups(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Groups:
    """The groups expected from the model's config, on which admission and `kvllm plan` rely.

    Raises UsageError if vLLM made different ones.
    """
    expected = groups_of_engine(vllm_config)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    local = [spec for spec in specs if not isinstance(spec, KvSpec)]
    made = {local_of(spec) for spec in local}
    sizes = {spec.block_size for spec in local}
    wanted = expected.local_block_size(next((s.block_size for s in specs if isinstance(s, KvSpec)), 0))
    other_blocks = isinstance(expected.local, Local) and sizes != {wanted}
    if len(local) != expected.num_local or made != ({expected.local} if expected.local else set()) or other_blocks:
        raise UsageError(
            f"KvLLM does not support {vllm_config.model_config.model}: according to its config, {expected.num_local} "
            f"KV cache groups have local layers ({expected.local}, blocks of {wanted}), but vLLM made {len(local)} "
            f"({made or None}, blocks of {sorted(sizes)})."
        )
    return expected


def local_of(spec: KVCacheSpec) -> Local | Recurrent | str:
    """The kind of the layers with this spec; for an unknown spec its class name."""
    if isinstance(spec, SlidingWindowSpec):
        return Local(spec.sliding_window)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return Local(spec.attention_chunk_size, chunked=True)
    if isinstance(spec, MambaSpec):
        return Recurrent()
    return type(spec).__name__


def only_hashed(cache_blocks: CacheBlocks, hash_block_size: int, all_cached: set[str] | None = None) -> CacheBlocks:
    """Limit vLLM's `cache_blocks` to the tokens that have hashes: in a compressed request, those of the prompt.

    all_cached: ids of requests that have nothing more to cache; the result adds to it, and skips the requests in it.
                vLLM calls it twice in every step of every request, which takes a tenth of the scheduler's time. None:
                skip none
    """

    def cache_hashed_blocks(request: Request, num_computed_tokens: int) -> None:
        if all_cached is not None and request.request_id in all_cached:
            return
        num_hashed = len(request.block_hashes) * hash_block_size
        cache_blocks(request, min(num_computed_tokens, num_hashed))
        # Without a hasher there will be no more hashes.
        if all_cached is not None and num_computed_tokens >= num_hashed and request._block_hasher is None:
            all_cached.add(request.request_id)

    return cache_hashed_blocks
