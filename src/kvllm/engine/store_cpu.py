"""The paged cache of vLLM's CPU backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvllm.compression.paged_store import PagedCandidates, PagedStore
from kvllm.compression.store import ALL_LAYERS
from kvllm.engine import cpu_cache
from kvllm.methods.base import Kept


class CpuStore(PagedStore):
    """layers: vLLM's attention layers, whose caches exist from the first step on"""

    def __init__(self, *args: Any, layers: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers = layers
        self._reader: cpu_cache.PackedReader | None = None

    def read(self, candidates: PagedCandidates, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        if self._reader is None:
            self._reader = cpu_cache.PackedReader(self.layers[0].kv_cache, self.layers[0].isa)
        caches = [layer.kv_cache for layer in self.layers[layers]]
        read = [self._reader.read(caches, blocks) for blocks in candidates.blocks.long()]
        keys, values = zip(*read, strict=True)
        return (keys[0], values[0]) if len(read) == 1 else (torch.cat(keys), torch.cat(values))

    def move(self, written: Tensor, homes: Tensor) -> None:
        for layer in self.layers:
            layer.kv_cache[homes] = layer.kv_cache[written]

    def write(self, candidates: PagedCandidates, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        if kept.keys is None or kept.values is None:
            kept = kept.gathered(*self.read(candidates, layers))
        assert kept.keys is not None and kept.values is not None
        tokens = torch.arange(kept.keys.shape[1])
        rows = zip(kept.keys, kept.values, strict=True)
        for blocks in candidates.blocks.long():
            slots = blocks[tokens // self.block_size] * self.block_size + tokens % self.block_size
            for layer in self.layers[layers]:
                cpu_cache.write(layer.kv_cache, *next(rows), slots, layer.isa)
