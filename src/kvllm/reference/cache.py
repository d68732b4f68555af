"""The KV cache of a request as plain tensors, one cache per layer, and the compressor's view of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvllm.compression.query_bank import dequantize, quantize
from kvllm.compression.query_ring import query_shifts
from kvllm.compression.rows import Due
from kvllm.compression.store import ALL_LAYERS
from kvllm.config import KvConfig
from kvllm.layers import LayerKind
from kvllm.methods.base import Kept
from kvllm.reference.formats import CacheFormat
from kvllm.support import PLAIN_BITS


class LayerCache:
    """The cache of one layer. Tensors are replaced, never modified in place.

    local:        the layer's kind; None: full attention. A local layer keeps the whole text, and its attention masks
                  what is out of range; a recurrent layer keeps nothing here
    format:       how keys and values are stored; None: unchanged
    exact_until:  steps that start before this token attend to their own keys and values as they were before storing
    keys, values: [num_tokens, num_kv_heads, head_dim], keys after RoPE: what remains of the text, in text order
    queries:      [up to max_queries, num_heads, head_dim], after RoPE, of the newest tokens
    """

    keys: Tensor
    values: Tensor
    queries: Tensor

    def __init__(
        self, max_queries: int, local: LayerKind = None, format: CacheFormat | None = None, exact_until: int = 0
    ) -> None:
        self.max_queries = max_queries
        self.local = local
        self.format = format
        self.exact_until = exact_until
        self.num_appended = 0

    def append(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens, [num_new, num_heads or num_kv_heads, head_dim] each.

        returns the keys and values that these tokens attend to, [num_tokens, num_kv_heads, head_dim] each
        """
        first, self.num_appended = self.num_appended, self.num_appended + len(keys)
        stored = self.stored(keys, values)
        seen = (keys, values) if first < self.exact_until else stored
        if first:
            seen = torch.cat([self.keys, seen[0]]), torch.cat([self.values, seen[1]])
            stored = torch.cat([self.keys, stored[0]]), torch.cat([self.values, stored[1]])
            queries = torch.cat([self.queries, queries])
        self.keys, self.values = stored
        self.queries = queries[max(0, len(queries) - self.max_queries) :]
        return seen

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values after storing and loading, in the same shape and dtype."""
        return (keys, values) if self.format is None else self.format.round_trip(keys, values)


class Span(NamedTuple):
    """The physical indices of the candidates."""

    start: int
    num_tokens: int


class DenseStore:
    """The compressor's view of the layers of one request."""

    max_batch = 1

    def __init__(self, config: KvConfig, layers: Sequence[LayerCache]) -> None:
        self.config = config
        self.layers = layers
        self.num_layers = len(layers)

    @property
    def num_kv_heads(self) -> int:
        return self.layers[0].keys.shape[1]

    def candidates(self, due: Sequence[Due]) -> Span:
        (only,) = due
        start = only.geometry.candidate_start(only.num_prompt_tokens, only.event)
        return Span(start, only.geometry.shape(only.event).num_candidates)

    def prompt(self, due: Due) -> Span:
        cut = due.geometry.prompt_shape(due.num_prompt_tokens)
        assert cut is not None
        return Span(0, cut.num_raw)

    def part(self, candidates: Span, events: slice) -> Span:
        assert events.start == 0  # there is only one event
        return candidates

    def queries(self, candidates: Span, layers: slice = ALL_LAYERS) -> Tensor:
        """The queries that the engine's query bank would hold."""
        return torch.stack([self._stored(layer) for layer in self.layers[layers]])

    def _stored(self, layer: LayerCache) -> Tensor:
        """[num_queries, num_heads, head_dim] in float32."""
        stride, device = self.config.query_stride, layer.queries.device
        group_size = layer.queries.shape[1] // layer.keys.shape[1]
        # Indices counted back from the newest token, -1; the heads of a query group take turns.
        behind = -1 - stride * torch.arange(self.config.num_queries - 1, -1, -1, device=device)
        shifts = torch.from_numpy(query_shifts(stride, group_size)).to(device)
        members = torch.arange(group_size, device=device)
        grouped = layer.queries.unflatten(1, (-1, group_size))  # [num_tokens, num_kv_heads, group_size, head_dim]
        chosen = grouped[behind[:, None] - shifts, :, members]  # [num_queries, group_size, num_kv_heads, head_dim]
        stored = torch.float32 if chosen.dtype == torch.float32 else torch.int8  # as in the bank
        return dequantize(*quantize(chosen.transpose(1, 2).flatten(1, 2), stored))

    def read(self, candidates: Span, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        span = slice(candidates.start, candidates.start + candidates.num_tokens)
        chosen = self.layers[layers]
        return torch.stack([x.keys[span] for x in chosen]), torch.stack([x.values[span] for x in chosen])

    def write(self, candidates: Span, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        """Replace the candidates with the survivors; later tokens move up."""
        start, end = candidates.start, candidates.start + candidates.num_tokens
        keys, values = self.read(candidates, layers)
        kept = kept.gathered(keys, values)
        assert kept.keys is not None and kept.values is not None
        for layer, k, v in zip(self.layers[layers], kept.keys.to(keys), kept.values.to(values), strict=True):
            if self.config.survivor_bits == PLAIN_BITS:  # else survivors are packed, and the format does not apply
                k, v = layer.stored(k, v)
            layer.keys = torch.cat([layer.keys[:start], k, layer.keys[end:]])
            layer.values = torch.cat([layer.values[:start], v, layer.values[end:]])
