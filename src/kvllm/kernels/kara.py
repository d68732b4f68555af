"""Kara in three or four launches: scores, selection, then compaction or refitting."""

from __future__ import annotations

import torch

from kvllm.compression.compressor import Fused
from kvllm.compression.paged_store import PagedCandidates
from kvllm.compression.query_bank import QueryBank
from kvllm.config import KvConfig
from kvllm.kernels.compact import compact
from kvllm.kernels.paged import PagedCache
from kvllm.kernels.queries import DueQueries
from kvllm.kernels.refit import MOST_DIMS, refit
from kvllm.kernels.registry import serves
from kvllm.kernels.select_chunks import select_chunks
from kvllm.kernels.window_scores import MOST_DIMS as MOST_SCORED_DIMS
from kvllm.kernels.window_scores import window_scores
from kvllm.methods.base import Method
from kvllm.methods.kara import Kara
from kvllm.methods.rope import Rope, Rotation


def covers(method: Method, head_dim: int) -> bool:
    """Whether the kernels do exactly what the method does, for this head_dim."""
    assert isinstance(method, Kara)
    return method.fused and head_dim <= MOST_SCORED_DIMS and (head_dim <= MOST_DIMS or not method.refits(num_kept=1))


@serves(Kara, covers)
def kara_kernels(method: Method, config: KvConfig, bank: QueryBank, cache: PagedCache, rope: Rope | None) -> Fused:
    """Kara over the paged cache."""
    assert isinstance(method, Kara)
    rotation = _rotation(method, config, bank, cache, rope)

    def compress(candidates: PagedCandidates, num_kept: int) -> None:
        blocks, queries = candidates.blocks, DueQueries(bank, candidates.ring_starts.int(), rotation)
        scores = window_scores(queries, blocks, cache, method.value_norm, method.keydiff_power, method.attention_floor)
        kept = select_chunks(scores, num_kept, method.max_chunk_size, method.chunk_fill)
        if method.refits(num_kept):
            refit(queries, kept, blocks, cache, method.key_ridge, method.value_ridge)
        else:
            compact(kept, blocks, cache)

    return compress


def _rotation(method: Kara, config: KvConfig, bank: QueryBank, cache: PagedCache, rope: Rope | None) -> Rotation | None:
    """The rotation of the stored queries, oldest first; the same at every event, since their spacing is."""
    if rope is None:
        return None
    positions = torch.arange(config.num_queries, device=bank.queries.device) * config.query_stride
    # No more precise than the products, since the kernel reads the tables for every head of every layer.
    dtype = torch.float32 if cache.dtype == torch.float32 else torch.bfloat16
    return method.rotation(rope, positions, bank.shifts, cache.head_dim, dtype)
