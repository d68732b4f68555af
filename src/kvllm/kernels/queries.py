"""Shared by the kernels that read stored queries: finding and rotating them, and loading tiles of the paged cache."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.compression.query_bank import QueryBank
from kvllm.kernels.paged import TL_DTYPES, layer_ptr, next_power_of_2
from kvllm.methods.rope import Rotation


@dataclass(frozen=True)
class DueQueries:
    """The stored queries of the requests that are due, and their rotation to later positions.

    ring_starts: [num_due] int32, `QueryBank.ring_start` of each
    rotation:    by distances [num_queries, 1, group_size], oldest first, for all layers or per layer; None: the queries
                 are not rotated
    """

    bank: QueryBank
    ring_starts: Tensor
    rotation: Rotation | None = None

    def __len__(self) -> int:
        return len(self.ring_starts)

    @property
    def num_rows(self) -> int:
        """Stored queries per KV head: those of all heads of its query group."""
        return self.bank.num_queries * self.bank.group_size

    def split(self, size: int) -> list[DueQueries]:
        return [replace(self, ring_starts=starts) for starts in self.ring_starts.split(size)]

    def rotated_ref(self) -> Tensor:
        """[num_due * num_layers, num_queries, num_kv_heads, group_size, head_dim] in float64."""
        queries = self.bank.of(self.ring_starts.long()).transpose(0, 1).flatten(0, 1).double()
        grouped = queries.unflatten(2, (self.bank.num_kv_heads, -1))
        if self.rotation is None:
            return grouped
        # [num_due, num_layers, num_queries, num_kv_heads, group_size, head_dim]: `rotation` broadcasts to it
        return self.rotation.apply(grouped.unflatten(0, (len(self), -1))).flatten(0, 1)

    def arguments(self) -> tuple[Any, ...]:
        """The kernel arguments for `load_queries`, from `numbers` to `max_num_reqs`."""
        given = self.rotation
        rotations = (None, None, None, None) if given is None else (given.cos, given.sin, given.first, given.second)
        return (self.bank.queries, self.bank.scales, *rotations, self.ring_starts, self.bank.queries.shape[1])

    def sizes(self, dot_dtype: torch.dtype) -> dict[str, Any]:
        """The kernel constants that go with `arguments`."""
        return dict(
            NUM_HEADS=self.bank.num_heads,
            GROUP_SIZE=self.bank.group_size,
            NUM_ROWS=self.num_rows,
            DOT_DTYPE=TL_DTYPES[dot_dtype],
            NUM_ROTATIONS=num_rotations(self.rotation),
            HALVES=self.rotation is None or self.rotation.halves,
            BLOCK_H=max(16, next_power_of_2(self.bank.head_dim // 2)),
        )


def num_rotations(rotation: Rotation | None) -> int:
    """Number of tables of sines and cosines: none, one for all layers, or one per layer."""
    if rotation is None:
        return 0
    return rotation.cos.shape[0] if rotation.cos.ndim > 4 else 1


@triton.jit
def load_tile(ptrs, offsets, mask, layer, dims, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, NUM_DIMS: tl.constexpr):
    """The dimensions `dims` of the candidates' keys or values, [BLOCK_T, len(dims)]; zeros past the first NUM_DIMS."""
    rows = layer_ptr(ptrs, layer, DTYPE, ALIGNMENT) + offsets[:, None] + dims[None, :]
    indices = tl.arange(0, dims.shape[0])
    return tl.load(rows, mask=mask[:, None] & (indices < NUM_DIMS)[None, :], other=0.0)


@triton.jit
def pairs(first, second, NUM_PAIRS: tl.constexpr, HALVES: tl.constexpr, BLOCK_H: tl.constexpr):
    """The pairs of dimensions that are rotated together, [BLOCK_H] each; int32, which needs half the registers."""
    pairs = tl.arange(0, BLOCK_H)
    if HALVES:
        firsts, seconds = pairs, pairs + NUM_PAIRS
    else:
        firsts = tl.load(first + pairs, mask=pairs < NUM_PAIRS, other=0).to(tl.int32)
        seconds = tl.load(second + pairs, mask=pairs < NUM_PAIRS, other=0).to(tl.int32)
    return firsts, seconds


@triton.jit
def ring(ring_starts, max_num_reqs, due, layer, NUM_QUERIES: tl.constexpr):
    """A request's row among the bank's (layer, row) pairs, and the entry of its oldest query."""
    start = tl.load(ring_starts + due).to(tl.int32)
    return layer * max_num_reqs + start // NUM_QUERIES, start % NUM_QUERIES


@triton.jit
def load_queries(
    numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_ROTATIONS: tl.constexpr, HALVES: tl.constexpr, DOT_DTYPE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The first and second dimensions of the rotated queries, [BLOCK_Q, BLOCK_H] each, and their scales, [BLOCK_Q].

    Row r is query r // GROUP_SIZE, oldest first, of head r % GROUP_SIZE in the group. layer_row, oldest: from `ring`.
    """
    num_queries: tl.constexpr = NUM_ROWS // GROUP_SIZE
    num_pairs: tl.constexpr = HEAD_DIM // 2
    entries = (oldest + rows // GROUP_SIZE) % num_queries
    vectors = (layer_row * num_queries + entries) * NUM_HEADS + head * GROUP_SIZE + rows % GROUP_SIZE
    pairs = tl.arange(0, BLOCK_H)
    mask = (rows < NUM_ROWS)[:, None] & (pairs < num_pairs)[None, :]
    if numbers.dtype.element_ty == tl.float32:
        numbers += vectors[:, None] * HEAD_DIM
        a = tl.load(numbers + firsts[None, :], mask=mask, other=0.0)
        b = tl.load(numbers + seconds[None, :], mask=mask, other=0.0)
    else:
        numbers += vectors[:, None] * num_pairs
        if HALVES:  # both codes of a number
            packed = tl.load(numbers + pairs[None, :], mask=mask, other=0).to(tl.int32)
            a, b = _unpack(packed)
        else:
            a, b = _codes(numbers, firsts, mask, num_pairs), _codes(numbers, seconds, mask, num_pairs)
        a, b = a.to(tl.float32), b.to(tl.float32)
    if NUM_ROTATIONS > 0:
        if NUM_ROTATIONS > 1:
            cos += layer * NUM_ROWS * num_pairs
            sin += layer * NUM_ROWS * num_pairs
        angles = rows[:, None] * num_pairs + pairs[None, :]
        c = tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angles, mask=mask, other=0.0).to(tl.float32)
        a, b = a * c - b * s, a * s + b * c
    scale = tl.load(scales + vectors, mask=rows < NUM_ROWS, other=0.0).to(tl.float32)
    return a.to(DOT_DTYPE), b.to(DOT_DTYPE), scale


@triton.jit
def _codes(numbers, dims, mask, NUM_PAIRS: tl.constexpr):
    """The codes of some dimensions, packed as by `kvllm.compression.query_bank.quantize`."""
    packed = tl.load(numbers + (dims % NUM_PAIRS)[None, :], mask=mask, other=0).to(tl.int32)
    low, high = _unpack(packed)
    return tl.where((dims < NUM_PAIRS)[None, :], low, high)


@triton.jit
def _unpack(packed):
    """Both codes of a number, int32.

    Adds no constant: LLVM narrows these operations to 16 bits and packs two of them into a register, and ptxas 12.8 and
    12.9 (Triton 3.6 to 3.9 on GPUs before Blackwell) may lose the constant of one half of such an addition
    (triton-lang/triton#11581), as it did with `high = (packed + 8) >> 4`. PTX has no packed shift or subtraction.
    """
    low = packed << 28 >> 28  # the sign of its four bits extended
    return low, (packed - low) >> 4


@triton.jit
def locate(NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """This program's index in the batch, request, layer and KV head. Consecutive programs read the same cache lines."""
    pid = tl.program_id(0).to(tl.int64)
    return pid, pid // (NUM_LAYERS * NUM_KV_HEADS), pid // NUM_KV_HEADS % NUM_LAYERS, pid % NUM_KV_HEADS
