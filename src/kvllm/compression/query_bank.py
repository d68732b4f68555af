"""The queries that the engines keep for scoring: a ring buffer for each request and layer, in int8.

The queries of a token take more memory than its KV pairs (four times as many heads as KV heads, at 8B scale), so the
bank holds every `query_stride`-th query of a head (`kvllm.compression.query_ring`) in int8, with one scale for each
vector. The queries of a float32 model are stored unquantized, since such a model is used for comparisons: quantization
would amplify differences in the last bit, and sometimes change which tokens are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvllm.compression.query_ring import entry_of, query_shifts
from kvllm.layout import IntArray

LEVELS = 127
SMALLEST = 1e-30  # avoids division by zero for a query of zeros


@dataclass(frozen=True)
class QueryBank:
    """queries: [num_layers, max_num_reqs, num_queries, num_heads, head_dim] int8 or float32, after RoPE
    scales:  [num_layers, max_num_reqs, num_queries, num_heads] float32; a query is its codes times its scale
    """

    queries: Tensor
    scales: Tensor
    num_kv_heads: int
    query_stride: int
    shifts: Tensor  # [group_size], of `kvllm.compression.query_ring.query_shifts`

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        max_num_reqs: int,
        num_queries: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        query_stride: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> QueryBank:
        """dtype: the model's"""
        shape = (num_layers, max_num_reqs, num_queries, num_heads)
        stored = torch.float32 if dtype == torch.float32 else torch.int8
        queries = torch.zeros(*shape, head_dim, dtype=stored, device=device)
        shifts = torch.from_numpy(query_shifts(query_stride, num_heads // num_kv_heads)).to(device)
        return cls(queries, torch.zeros(shape, device=device), num_kv_heads, query_stride, shifts)

    @cached_property
    def num_queries(self) -> int:
        return self.queries.shape[2]

    @cached_property
    def group_size(self) -> int:
        return self.queries.shape[3] // self.num_kv_heads

    @cached_property
    def period(self) -> int:
        """Tokens after which the ring wraps around."""
        return self.num_queries * self.query_stride

    @property
    def num_bytes(self) -> int:
        return self.queries.nbytes + self.scales.nbytes

    def codes(self, rows: IntArray | int, offsets: IntArray) -> IntArray:
        """One integer per token for `store`: its request's row in the bank, and its offset within the ring's period.

        rows, offsets: integers that broadcast; offsets count tokens after the protected prompt, from 0
        """
        return rows * self.period + offsets % self.period

    def targets(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which queries of a step are kept and where, the same in every layer: the argument of `put`.

        codes:  [num_tokens] int64, from `codes`, or -1 to store nothing; no two tokens of a row may share a ring entry
        returns four [num_targets] tensors: token, head within its query group, row, and ring entry of each kept query
        """
        # Both [num_tokens, group_size].
        stored, entries = entry_of(codes[:, None] % self.period, self.shifts, self.query_stride, self.num_queries)
        token, member = (stored & (codes >= 0)[:, None]).nonzero(as_tuple=True)
        return token, member, codes[token] // self.period, entries[token, member]

    def store(self, layer: int, query: Tensor, codes: Tensor) -> None:
        """Store the queries of a step's tokens in one layer.

        query: [num_tokens, num_heads, head_dim], after RoPE; codes: as in `targets`
        """
        targets = self.targets(codes)
        self.put(query[None, targets[0]], targets, slice(layer, layer + 1))

    def put(self, queries: Tensor, targets: tuple[Tensor, Tensor, Tensor, Tensor], layers: slice = slice(None)) -> None:
        """Store the queries that `targets` chose.

        queries: [num_layers, num_targets, num_heads, head_dim], all heads of the targets' tokens, after RoPE

        Takes all layers at once: one call per layer would take longer than a small model's attention.
        """
        _, member, row, entry = targets
        shape = (self.num_kv_heads, self.group_size)
        chosen = torch.arange(len(member), device=member.device)
        numbers, scales = quantize(queries.unflatten(2, shape)[:, chosen, :, member], self.queries.dtype)
        self.queries[layers].unflatten(3, shape)[:, row, entry, :, member] = numbers
        self.scales[layers].unflatten(3, shape)[:, row, entry, :, member] = scales

    def ring_start(self, row: Any, oldest_entry: Any) -> Any:
        """One integer per request for readers: its row in the bank, and its ring's oldest entry.

        Takes integers, arrays or tensors that broadcast.
        """
        return row * self.num_queries + oldest_entry

    def row_of(self, ring_start: Any) -> Any:
        """The row that `ring_start` encodes."""
        return ring_start // self.num_queries

    def of(self, ring_starts: Tensor | int, layers: slice = slice(None)) -> Tensor:
        """The stored queries in float32, oldest first: [num_layers, *ring_starts, num_queries, num_heads, head_dim]."""
        starts = torch.as_tensor(ring_starts, device=self.queries.device)[..., None]
        entries = (starts + torch.arange(self.num_queries, device=starts.device)) % self.num_queries
        vectors = self.row_of(starts) * self.num_queries + entries

        def taken(stored: Tensor) -> Tensor:  # whole entries, which indices of rows and entries would copy piecemeal
            return stored[layers].flatten(1, 2).index_select(1, vectors.view(-1)).unflatten(1, vectors.shape)

        return dequantize(taken(self.queries), taken(self.scales))


def quantize(vectors: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Codes of the same shape in `dtype` (int8 or float32), and a float32 scale for each vector (the last axis)."""
    vectors = vectors.float()
    if dtype == torch.float32:
        return vectors, torch.ones_like(vectors[..., 0])
    # Multiplied by the reciprocal, as PyTorch does on GPUs: dividing would give other scales on CPUs.
    scales = vectors.abs().amax(dim=-1).clamp(min=SMALLEST) * (1 / LEVELS)
    return (vectors / scales.unsqueeze(-1)).round().to(torch.int8), scales


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    return numbers.float() * scales.unsqueeze(-1)
