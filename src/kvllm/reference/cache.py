"""The KV cache of a request as plain tensors, one a layer, and the compressor's view of it."""

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
    """What one layer remembers. The tensors are replaced, never written into.

    local:         how the layer looks back; None for a layer of full attention. A local layer keeps the whole text,
                   and its attention masks what it does not see; recurrent layers keep nothing here
    format:        how numbers are stored; None: as they are
    exact_until:   tokens of the text whose own step attends to them as they were before they were stored
    keys, values: [num_tokens, num_kv_heads, head_dim], keys after RoPE: what is left of the text, in its order
    queries:      [up to max_queries, num_heads, head_dim], after RoPE, of the newest tokens of the text
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
        """Take in new tokens, [num_new, num_heads or num_kv_heads, head_dim] each.

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
        """What the cache gives back of keys and values, in their shape and dtype."""
        return (keys, values) if self.format is None else self.format.round_trip(keys, values)


class Span(NamedTuple):
    """Candidates by physical index."""

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
        assert events.start == 0  # there is one
        return candidates

    def queries(self, candidates: Span, layers: slice = ALL_LAYERS) -> Tensor:
        """What the engines' query bank holds of the newest tokens."""
        return torch.stack([self._stored(layer) for layer in self.layers[layers]])

    def _stored(self, layer: LayerCache) -> Tensor:
        """[num_queries, num_heads, head_dim] in float32."""
        stride, device = self.config.query_stride, layer.queries.device
        group_size = layer.queries.shape[1] // layer.keys.shape[1]
        # From the newest token back, which is -1; the heads of a query group take turns.
        behind = -1 - stride * torch.arange(self.config.num_queries - 1, -1, -1, device=device)
        shifts = torch.from_numpy(query_shifts(stride, group_size)).to(device)
        members = torch.arange(group_size, device=device)
        grouped = layer.queries.unflatten(1, (-1, group_size))  # [num_tokens, num_kv_heads, group_size, head_dim]
        chosen = grouped[behind[:, None] - shifts, :, members]  # [num_queries, group_size, num_kv_heads, head_dim]
        stored = torch.float32 if chosen.dtype == torch.float32 else torch.int8
        return dequantize(*quantize(chosen.transpose(1, 2).flatten(1, 2), stored))

    def read(self, candidates: Span, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        span = slice(candidates.start, candidates.start + candidates.num_tokens)
        chosen = self.layers[layers]
        return torch.stack([x.keys[span] for x in chosen]), torch.stack([x.values[span] for x in chosen])

    def write(self, candidates: Span, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        """The survivors replace the candidates; the rest moves up."""
        start, end = candidates.start, candidates.start + candidates.num_tokens
        keys, values = self.read(candidates, layers)
        kept = kept.gathered(keys, values)
        assert kept.keys is not None and kept.values is not None
        for layer, k, v in zip(self.layers[layers], kept.keys.to(keys), kept.values.to(values), strict=True):
            if self.config.survivor_bits == PLAIN_BITS:  # else they are in packed blocks, whatever the cache's format
                k, v = layer.stored(k, v)
            layer.keys = torch.cat([layer.keys[:start], k, layer.keys[end:]])
            layer.values = torch.cat([layer.values[:start], v, layer.values[end:]])
