"""The KV cache of one layer of one request, as plain tensors, and one compression of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvllm.methods.base import Kept, Window
from kvllm.methods.rope import Rope
from kvllm.query_bank import dequantize, quantize


class LayerCache:
    """What one layer remembers. The tensors are replaced, never written into.

    keys, values: [num_tokens, num_kv_heads, head_dim], keys after RoPE: what is left of the text, in its order
    positions:    [num_kv_heads, num_tokens], the place in the text of each
    queries:      [up to max_queries, num_heads, head_dim], after RoPE, of the newest tokens of the text
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor

    def __init__(self, max_queries: int) -> None:
        self.max_queries = max_queries
        self.num_appended = 0

    def append(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take in new tokens: [num_new, num_heads or num_kv_heads, head_dim] each."""
        first, self.num_appended = self.num_appended, self.num_appended + len(keys)
        positions = torch.arange(first, self.num_appended, device=keys.device).expand(keys.shape[1], -1)
        if first:
            keys, values = torch.cat([self.keys, keys]), torch.cat([self.values, values])
            positions = torch.cat([self.positions, positions], dim=1)
            queries = torch.cat([self.queries, queries])
        self.keys, self.values, self.positions = keys, values, positions
        self.queries = queries[max(0, len(queries) - self.max_queries) :]


def compress(
    layers: Sequence[LayerCache],
    shrink: Callable[[Window, int], Kept],
    start: int,
    num_candidates: int,
    num_kept: int,
    places: Tensor,
    shifts: Tensor,
    rope: Rope | None = None,
) -> Kept:
    """Let the candidates [start, start + num_candidates) of every layer shrink to `num_kept`; the rest moves up.

    shrink: of a method, `compress` or `compress_prompt`
    places: [num_queries], the queries to judge by, in this order, as indices from the first candidate; what lies
            after the candidates is counted on
    shifts: [group_size], by how many tokens the queries of each head of a group are older than that
    """
    end = start + num_candidates
    behind = places - (len(layers[0].keys) - start)  # from the newest token back: -1 is the newest
    window = Window(
        queries=torch.stack([stored_queries(layer, behind, shifts) for layer in layers]),
        query_positions=places,
        keys=torch.stack([layer.keys[start:end] for layer in layers]),
        values=torch.stack([layer.values[start:end] for layer in layers]),
        positions=torch.stack([layer.positions[:, start:end] for layer in layers]),
        layers=torch.arange(len(layers), device=places.device),
        query_shifts=shifts,
        rope=rope,
    )
    kept = shrink(window, num_kept)
    keys = rows(window.keys, kept.indices) if kept.keys is None else kept.keys.to(window.keys)
    values = rows(window.values, kept.indices) if kept.values is None else kept.values.to(window.values)
    positions = window.positions.gather(2, kept.indices)
    for i, layer in enumerate(layers):
        layer.keys = torch.cat([layer.keys[:start], keys[i], layer.keys[end:]])
        layer.values = torch.cat([layer.values[:start], values[i], layer.values[end:]])
        layer.positions = torch.cat([layer.positions[:, :start], positions[i], layer.positions[:, end:]], dim=1)
    return kept


def stored_queries(layer: LayerCache, behind: Tensor, shifts: Tensor) -> Tensor:
    """[num_queries, num_heads, head_dim] in float32: what the engines' query bank holds of the tokens `behind`."""
    members = torch.arange(len(shifts), device=shifts.device)
    grouped = layer.queries.unflatten(1, (-1, len(shifts)))  # [num_tokens, num_kv_heads, group_size, head_dim]
    chosen = grouped[behind[:, None] - shifts, :, members]  # [num_queries, group_size, num_kv_heads, head_dim]
    stored = torch.float32 if chosen.dtype == torch.float32 else torch.int8
    return dequantize(*quantize(chosen.transpose(1, 2).flatten(1, 2), stored))


def rows(tokens: Tensor, indices: Tensor) -> Tensor:
    """What each head keeps.

    tokens:  [batch, num_tokens, num_kv_heads, head_dim]
    indices: [batch, num_kv_heads, num_kept]
    returns  [batch, num_kept, num_kv_heads, head_dim]
    """
    return tokens.gather(1, indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))
