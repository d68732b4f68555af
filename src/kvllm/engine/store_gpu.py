"""The paged cache of vLLM's GPU backends, read and written by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvllm.compression.paged_store import PagedCandidates, PagedStore
from kvllm.compression.store import ALL_LAYERS
from kvllm.kernels.compact import compact, compact_ref
from kvllm.kernels.paged import PagedCache
from kvllm.kernels.windows import gather_window, gather_window_ref, scatter_window, scatter_window_ref
from kvllm.methods.base import Kept


class GpuStore(PagedStore):
    """A part of the layers is read and written without kernels: only prompts are cut so, in parts that depend on their
    lengths, and a kernel would be compiled again for each.

    dtype: the model's, in which methods get keys and values
    """

    max_batch = 4  # dense copies of all layers are large

    def __init__(self, *args: Any, cache: PagedCache, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = cache
        self.dtype = dtype

    def read(self, candidates: PagedCandidates, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        if layers == ALL_LAYERS:
            return gather_window(candidates.blocks, self.cache, self.dtype)
        return gather_window_ref(candidates.blocks, self.cache.part(layers), self.dtype)

    def move(self, written: Tensor, homes: Tensor) -> None:
        for layer in range(self.cache.num_layers):
            for blocks in self.cache.raw(layer):
                blocks.index_copy_(0, homes, blocks.index_select(0, written))

    def write(self, candidates: PagedCandidates, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        whole = layers == ALL_LAYERS
        cache = self.cache if whole else self.cache.part(layers)
        if kept.keys is None or kept.values is None:
            indices = kept.indices.int().unflatten(0, (len(candidates.blocks), cache.num_layers)).contiguous()
            (compact if whole else compact_ref)(indices, candidates.blocks, cache)
        else:
            (scatter_window if whole else scatter_window_ref)(kept.keys, kept.values, candidates.blocks, cache)
