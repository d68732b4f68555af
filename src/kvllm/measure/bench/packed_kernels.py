"""The kernels of packed survivors, for `kvllm bench kernels`: packing them, and one layer's attention over them."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvllm.compression.rounding import Rounding, packed_block_tokens
from kvllm.kernels.packed.attend import (
    Batch,
    PackedAttention,
    Plain,
    max_parts,
    merge_packed_ref,
    plan_parts,
)
from kvllm.kernels.packed.layout import PackedLayout
from kvllm.kernels.packed.pack import pack, pack_ref
from kvllm.kernels.paged import PagedCache
from kvllm.measure.bench.kernel_shape import Shape
from kvllm.support import PACKED_BITS

NUM_REQS = 64
CONTEXTS = (1024, 2048, 4096, 8192, 16384)  # packed tokens of each request


def rounding_of(shape: Shape) -> Rounding:
    return Rounding(PACKED_BITS, packed_block_tokens(shape.block_size, shape.head_dim, PACKED_BITS))


def num_packed(shape: Shape) -> int:
    """Number of packed tokens per window: the whole number of packed blocks closest to `num_kept`."""
    held = rounding_of(shape).block_tokens
    return max(1, round(shape.num_kept / held)) * held


class AttentionLoad:
    """One layer's decode attention for requests with this many packed blocks each, and nothing else to read.

    num_bytes: of codes, scales and lowest values
    """

    def __init__(self, shape: Shape, num_blocks: list[int], device: str) -> None:
        rounding, dtype, num_reqs = rounding_of(shape), getattr(torch, shape.dtype), len(num_blocks)
        size = (sum(num_blocks), shape.block_size, shape.num_kv_heads, 2 * shape.head_dim)
        # Random bits as codes; scales as quantising random numbers would give.
        layer = torch.empty(size, dtype=dtype, device=device).normal_(0, 0.1)
        self.keys, self.values = layer.split(shape.head_dim, dim=-1)
        layout = PackedLayout.of(PagedCache.from_layers([self.keys], [self.values]), rounding)
        survivors = torch.zeros(num_reqs, max(num_blocks), dtype=torch.int32, device=device)
        order = torch.randperm(size[0], device=device).int()
        for row, own in enumerate(order.split(num_blocks)):
            survivors[row, : len(own)] = own
        plan = np.zeros((6, num_reqs), np.int32)
        plan[1], plan[3] = num_blocks, np.arange(num_reqs)
        parts = np.zeros(max_parts(num_reqs, shape.num_kv_heads), np.int32)
        plan_parts(np.array(num_blocks), np.zeros(num_reqs, np.int64), shape.num_kv_heads, plan[4:], parts)
        starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=device)
        self.batch = Batch(starts, survivors, *(torch.from_numpy(t).to(device) for t in (plan, parts)))
        self.query = torch.randn(num_reqs, shape.num_heads, shape.head_dim, device=device).to(dtype)
        self.output = torch.zeros_like(self.query)
        nothing = torch.zeros(num_reqs, 1, dtype=torch.int32, device=device)
        self.plain = Plain(nothing, nothing[:, 0].contiguous())
        self.scale = shape.head_dim**-0.5
        self.layout = layout
        self.attention = PackedAttention(layout, shape.num_heads, shape.num_kv_heads, num_reqs, device)
        per_block = layout.num_tokens * shape.head_dim + 4 * (shape.head_dim + layout.num_tokens)
        self.num_bytes = sum(num_blocks) * shape.num_kv_heads * per_block

    def run(self) -> None:
        self.attention.decode(
            self.output, self.query, self.keys, self.values, self.batch, self.plain, self.scale
        )  # fmt: skip

    def reference(self) -> Tensor:
        """What `run` leaves in the output."""
        output = torch.zeros_like(self.output)
        lse = output.new_full(output.shape[1::-1], -torch.inf, dtype=torch.float32)
        merge_packed_ref(output, lse, self.query, self.keys, self.values, self.batch, self.layout, self.scale)
        return output


def attention_load(shape: Shape, num_tokens: int, device: str) -> AttentionLoad:
    return AttentionLoad(shape, [round(num_tokens / rounding_of(shape).block_tokens)] * NUM_REQS, device)


def pack_run(shape: Shape, blocks: Tensor, cache: PagedCache) -> partial[None]:
    return partial(pack, blocks, num_packed(shape), cache, rounding_of(shape))


def pack_reference(shape: Shape, blocks: Tensor, cache: PagedCache) -> None:
    pack_ref(blocks, num_packed(shape), cache, rounding_of(shape))
