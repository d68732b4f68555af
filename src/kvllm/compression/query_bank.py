"""The queries that the engines keep for scoring: a ring buffer for each request and layer, in four bits per element.

The queries of a token take more memory than its KV pairs (four times as many heads as KV heads, at 8B scale), so the
bank holds every `query_stride`-th query of a head (`kvllm.compression.query_ring`) in four bits per element, with one
scale for each vector. The queries of a float32 model are stored unquantized, since such a model is used for
comparisons: quantization would amplify differences in the last bit, and sometimes change which tokens are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvllm.compression.query_ring import entry_of, query_shifts
from kvllm.layout import IntArray

LEVELS = 7
SMALLEST = 1e-30  # avoids division by zero for a query of zeros


class Targets(NamedTuple):
    """Which queries of a step are kept and where, the same in every layer.

    sources: [num_kept] int64, each kept query's index among all heads of the step's tokens
    places:  [num_kept] int64, its index among all heads of all entries of all rows
    """

    sources: Tensor
    places: Tensor


@dataclass(frozen=True)
class QueryBank:
    """queries: [num_layers, max_num_reqs, num_queries, num_heads, head_dim / 2] int8 as of `quantize`, or
             [..., head_dim] float32; after RoPE
    scales:  [num_layers, max_num_reqs, num_queries, num_heads] bfloat16; a query is its codes times its scale
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
        """dtype: the model's; head_dim: even"""
        shape = (num_layers, max_num_reqs, num_queries, num_heads)
        size, stored = (head_dim, torch.float32) if dtype == torch.float32 else (head_dim // 2, torch.int8)
        queries = torch.zeros(*shape, size, dtype=stored, device=device)
        scales = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        shifts = torch.from_numpy(query_shifts(query_stride, num_heads // num_kv_heads)).to(device)
        return cls(queries, scales, num_kv_heads, query_stride, shifts)

    @cached_property
    def num_queries(self) -> int:
        return self.queries.shape[2]

    @cached_property
    def num_heads(self) -> int:
        return self.queries.shape[3]

    @cached_property
    def head_dim(self) -> int:
        return self.queries.shape[4] * (1 if self.queries.dtype == torch.float32 else 2)

    @cached_property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

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

    def stores_any(self, codes: IntArray) -> npt.NDArray[np.bool_]:
        """[num_tokens]: whether any head's query of a token is stored; codes: as in `targets`"""
        return self._stored_residues[codes % self.query_stride] & (codes >= 0)

    @cached_property
    def _stored_residues(self) -> npt.NDArray[np.bool_]:
        """[query_stride]: whether any head stores the query of a token whose code has this residue."""
        residues = np.arange(self.query_stride)
        stored, _ = entry_of(
            residues[:, None], query_shifts(self.query_stride, self.group_size), self.query_stride, self.num_queries
        )
        return stored.any(axis=1)

    def targets(self, codes: IntArray) -> Targets:
        """Where the queries of a step, or of several, go: the argument of `put`.

        codes: [num_tokens], from `codes`, or -1 to store nothing; no two tokens of a row may share a ring entry
        """
        # In NumPy, which is faster than PyTorch for so few numbers. Both [num_tokens, group_size].
        shifts = query_shifts(self.query_stride, self.group_size)
        stored, entries = entry_of(codes[:, None] % self.period, shifts, self.query_stride, self.num_queries)
        token, member = np.nonzero(stored & (codes >= 0)[:, None])
        entry = codes[token] // self.period * self.num_queries + entries[token, member]
        heads = np.arange(self.num_kv_heads) * self.group_size + member[:, None]  # [num_targets, num_kv_heads]
        sources = token[:, None] * self.num_heads + heads
        indices = sources.ravel(), (entry[:, None] * self.num_heads + heads).ravel()
        return Targets(*(torch.from_numpy(each).to(self.queries.device) for each in indices))

    def store(self, layer: int, query: Tensor, codes: Tensor) -> None:
        """Store the queries of a step's tokens in one layer.

        query: [num_tokens, num_heads, head_dim], after RoPE; codes: [num_tokens], as in `targets`
        """
        targets = self.targets(codes.cpu().numpy().astype(np.int64))
        self.put(query[None], targets, slice(layer, layer + 1))

    def put(self, queries: Tensor, targets: Targets, layers: slice = slice(None)) -> None:
        """Store the queries that `targets` chose.

        queries: [num_layers, num_tokens, num_heads, head_dim], of all tokens that `targets` was given, after RoPE

        Takes all layers at once: one call per layer would take longer than a small model's attention.
        """
        chosen = queries.flatten(1, 2).index_select(1, targets.sources)
        numbers, scales = quantize(chosen, self.queries.dtype)
        self.queries[layers].flatten(1, 3).index_copy_(1, targets.places, numbers)
        self.scales[layers].flatten(1, 3).index_copy_(1, targets.places, scales)

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
    """Codes of vectors (the last axis) of even length, and a bfloat16 scale for each.

    dtype: int8 packs two codes, of -7 to 7, into each number: number i is code i plus 16 times code i + head_dim / 2,
           so that most models' RoPE rotates the two together. float32 leaves the vectors as they are
    """
    vectors = vectors.float()
    if dtype == torch.float32:
        return vectors, torch.ones_like(vectors[..., 0], dtype=torch.bfloat16)
    # Multiplied by the reciprocal, as PyTorch does on GPUs: dividing would give other scales on CPUs.
    scales = (vectors.abs().amax(dim=-1).clamp(min=SMALLEST) * (1 / LEVELS)).bfloat16()
    low, high = (vectors / scales.float().unsqueeze(-1)).round().chunk(2, dim=-1)
    return torch.add(low, high, alpha=16).to(torch.int8), scales


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """The vectors of `quantize` in float32."""
    if numbers.dtype == torch.int8:
        high = (numbers + 8) >> 4
        numbers = torch.cat([numbers - (high << 4), high], dim=-1)
    return numbers.float() * scales.float().unsqueeze(-1)
