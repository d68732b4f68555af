"""Moves the survivors of an event to the first candidates, in place."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.kernels.paged import UNALIGNED, PagedCache, layer_ptr, next_power_of_2, token_offsets

_TILE_TOKENS = 64


def compact_ref(kept: Tensor, candidate_blocks: Tensor, cache: PagedCache) -> None:
    """Candidate j := candidate kept[j], for each head; bit for bit.

    kept:             [num_due, num_layers, num_kv_heads, num_kept] int32, ascending
    candidate_blocks: [num_due, num_candidates / block_size], block ids, all distinct
    """
    block_size = cache.block_size
    indices = torch.arange(kept.shape[-1], device=kept.device)
    heads = torch.arange(cache.num_kv_heads, device=kept.device)[:, None]
    for blocks, rows in zip(candidate_blocks.long(), kept.long(), strict=True):
        for layer in range(cache.num_layers):
            source, target = rows[layer], indices.expand_as(rows[layer])
            for paged in cache.raw(layer):
                moved = paged[blocks[source // block_size], source % block_size, heads]
                paged[blocks[target // block_size], target % block_size, heads] = moved


def compact(kept: Tensor, candidate_blocks: Tensor, cache: PagedCache) -> None:
    """`compact_ref` as a Triton kernel, one program per request, layer and KV head."""
    num_due, num_layers, num_kv_heads, num_kept = kept.shape
    assert kept.is_contiguous() and candidate_blocks.stride(1) == 1
    assert (num_layers, num_kv_heads) == (cache.num_layers, cache.num_kv_heads) and len(candidate_blocks) == num_due
    if num_due:
        _compact_kernel[(num_due * num_layers * num_kv_heads,)](
            kept,
            candidate_blocks,
            cache.key_ptrs,
            cache.value_ptrs,
            candidate_blocks.stride(0),
            *cache.strides,
            NUM_LAYERS=num_layers,
            NUM_KV_HEADS=num_kv_heads,
            NUM_KEPT=num_kept,
            HEAD_DIM=cache.head_dim,
            BLOCK_SIZE=cache.block_size,
            RAW_DTYPE=cache.raw_tl_dtype,
            ALIGNMENT=cache.alignment,
            BLOCK_T=min(_TILE_TOKENS, next_power_of_2(num_kept)),
            BLOCK_D=next_power_of_2(cache.head_dim),
            num_warps=4,
        )


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _compact_kernel(
    kept, candidate_blocks, key_ptrs, value_ptrs,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_KEPT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, RAW_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    layer, head = pid // NUM_KV_HEADS % NUM_LAYERS, pid % NUM_KV_HEADS
    block_row = candidate_blocks + pid // (NUM_LAYERS * NUM_KV_HEADS) * stride_candidates
    keys = layer_ptr(key_ptrs, layer, RAW_DTYPE, ALIGNMENT) + head * stride_kv_head
    values = layer_ptr(value_ptrs, layer, RAW_DTYPE, ALIGNMENT) + head * stride_kv_head
    dims = tl.arange(0, BLOCK_D)
    for start in range(0, NUM_KEPT, BLOCK_T):
        target = start + tl.arange(0, BLOCK_T)
        valid = target < NUM_KEPT
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        source = tl.load(kept + pid * NUM_KEPT + target, mask=valid, other=0)
        source = token_offsets(block_row, source, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
        target = token_offsets(block_row, target, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
        source, target = source[:, None] + dims[None, :], target[:, None] + dims[None, :]
        k = tl.load(keys + source, mask=mask)
        v = tl.load(values + source, mask=mask)
        # kept is ascending, so kept[j] >= j: a tile that writes tokens [a, b) reads tokens >= a, and later tiles read
        # tokens >= b. So no tile reads what an earlier one wrote, and working in place needs this barrier only, between
        # the reads and the writes of one tile.
        tl.debug_barrier()
        tl.store(keys + target, k, mask=mask)
        tl.store(values + target, v, mask=mask)
