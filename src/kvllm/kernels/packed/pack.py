"""Rounds survivors to four bits and packs them, in place."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.compression.rounding import Rounding
from kvllm.kernels.packed.layout import BITS, PackedLayout, as_words, write_block_ref
from kvllm.kernels.paged import UNALIGNED, PagedCache, layer_ptr, next_power_of_2, token_offsets
from kvllm.kernels.rounding import rounded, rounded_to_bfloat16
from kvllm.kernels.windows import gather_window_ref


def pack_ref(candidate_blocks: Tensor, num_kept: int, cache: PagedCache, rounding: Rounding) -> None:
    """Round the first `num_kept` candidates, and write them as packed blocks to the first of the candidates' blocks.

    candidate_blocks: [num_due, num_candidates / block_size], block ids, all distinct
    num_kept:         a multiple of `rounding.block_tokens`
    """
    layout = PackedLayout.of(cache, rounding)
    num_blocks = num_kept // layout.num_tokens
    keys, values = gather_window_ref(candidate_blocks, cache, torch.float32)
    key_blocks, rounded_values = rounding.round(keys[:, :num_kept], values[:, :num_kept])
    parts = [t.split(layout.num_tokens, dim=1) for t in rounded_values]
    for layer in range(cache.num_layers):
        for i in range(num_blocks):
            own = candidate_blocks[:, i].long()
            of_layer = [t[layer :: cache.num_layers] for t in key_blocks[i]]
            write_block_ref(as_words(cache.keys[layer]), own, type(rounded_values)(*of_layer), layout)
            of_layer = [t[i][layer :: cache.num_layers] for t in parts]
            write_block_ref(as_words(cache.values[layer]), own, type(rounded_values)(*of_layer), layout)


def pack(candidate_blocks: Tensor, num_kept: int, cache: PagedCache, rounding: Rounding) -> None:
    """`pack_ref` as a Triton kernel, one program per request, layer, KV head, and keys or values.

    A program packs one block after another. Packed block i overwrites the tokens from i * block_size on, which belong
    to packed blocks 0 to i, and these have already been read.
    """
    layout = PackedLayout.of(cache, rounding)
    num_due = len(candidate_blocks)
    assert candidate_blocks.stride(1) == 1 and num_kept % layout.num_tokens == 0
    if num_due:
        _pack_kernel[(num_due * cache.num_layers * cache.num_kv_heads, 2)](
            candidate_blocks,
            cache.key_ptrs,
            cache.value_ptrs,
            cache.k_scale,
            cache.v_scale,
            candidate_blocks.stride(0),
            *cache.strides,
            NUM_LAYERS=cache.num_layers,
            NUM_KV_HEADS=cache.num_kv_heads,
            NUM_UNITS=num_kept // layout.num_tokens,
            NUM_TOKENS=layout.num_tokens,
            HEAD_DIM=cache.head_dim,
            BLOCK_SIZE=cache.block_size,
            KV_DTYPE=cache.tl_dtype,
            ALIGNMENT=cache.alignment,
            ITEM_BYTES=cache.dtype.itemsize,
            HAS_SCALE=cache.k_scale is not None,
            TOKENS_PER_ROW=layout.tokens_per_row,
            PAIRS_PER_ROW=layout.pairs_per_row,
            CODE_ROWS=layout.code_rows,
            LEVELS=2**BITS - 1,
            BLOCK_T=next_power_of_2(layout.num_tokens),
            BLOCK_W=next_power_of_2(layout.num_words),
            num_warps=4,
        )


@triton.jit
def _codes(x, lowest, scale, LEVELS: tl.constexpr):
    """The codes of x, rounded half to even as in PyTorch."""
    steps = tl.div_rn(x - lowest, tl.maximum(scale, 1.1754943508222875e-38))
    return rounded(tl.minimum(tl.maximum(steps, 0.0), LEVELS)).to(tl.int32)


@triton.jit
def _stored(lowest, highest, LEVELS: tl.constexpr):
    """Scale and lowest value as they are stored: rounded to bfloat16 before the codes are chosen."""
    lowest = rounded_to_bfloat16(lowest)
    return rounded_to_bfloat16(tl.maximum(highest - lowest, 0.0) * (1 / LEVELS)), lowest


@triton.jit
def _store_pairs(pairs, indices, mask, scale, lowest, stride_row, PAIRS_PER_ROW: tl.constexpr):
    """pairs: pointer to the first pair row, of bfloat16"""
    offsets = indices // PAIRS_PER_ROW * stride_row + indices % PAIRS_PER_ROW * 2
    tl.store(pairs + offsets, scale.to(tl.bfloat16), mask=mask)
    tl.store(pairs + offsets + 1, lowest.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _pack_kernel(
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_UNITS: tl.constexpr, NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
    ITEM_BYTES: tl.constexpr, HAS_SCALE: tl.constexpr, TOKENS_PER_ROW: tl.constexpr, PAIRS_PER_ROW: tl.constexpr,
    CODE_ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    layer, head = pid // NUM_KV_HEADS % NUM_LAYERS, pid % NUM_KV_HEADS
    block_row = candidate_blocks + pid // (NUM_LAYERS * NUM_KV_HEADS) * stride_candidates
    by_channel = tl.program_id(1) == 0
    if by_channel:
        ptrs = key_ptrs
    else:
        ptrs = value_ptrs
    factor = 1.0
    if HAS_SCALE:
        if by_channel:
            factor = tl.load(k_scale + layer)
        else:
            factor = tl.load(v_scale + layer)
    plain = layer_ptr(ptrs, layer, KV_DTYPE, ALIGNMENT) + head * stride_kv_head
    packed = layer_ptr(ptrs, layer, tl.int16, ALIGNMENT) + head * stride_kv_head * ITEM_BYTES // 2
    NUM_WORDS: tl.constexpr = HEAD_DIM // 4
    stride_row = stride_kv_token * ITEM_BYTES // 2
    tokens, words = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_W)
    there, inside = tokens < NUM_TOKENS, words < NUM_WORDS
    mask = there[:, None] & inside[None, :]
    low, high = float("inf"), float("-inf")
    for unit in range(NUM_UNITS):
        source = token_offsets(
            block_row, unit * NUM_TOKENS + tokens, there, stride_kv_block, stride_kv_token, BLOCK_SIZE
        )
        source = plain + source[:, None] + words[None, :]
        x0 = tl.load(source, mask=mask).to(tl.float32)
        x1 = tl.load(source + NUM_WORDS, mask=mask).to(tl.float32)
        x2 = tl.load(source + 2 * NUM_WORDS, mask=mask).to(tl.float32)
        x3 = tl.load(source + 3 * NUM_WORDS, mask=mask).to(tl.float32)
        if HAS_SCALE:
            x0, x1, x2, x3 = x0 * factor, x1 * factor, x2 * factor, x3 * factor
        tl.debug_barrier()  # all of the block's tokens are read before any of it is written
        target = packed + tl.load(block_row + unit).to(tl.int64) * (stride_kv_block * ITEM_BYTES // 2)
        pairs = (target + CODE_ROWS * stride_row).to(tl.pointer_type(tl.bfloat16))
        if by_channel:
            s0, z0 = _stored(tl.min(tl.where(mask, x0, low), 0), tl.max(tl.where(mask, x0, high), 0), LEVELS)
            s1, z1 = _stored(tl.min(tl.where(mask, x1, low), 0), tl.max(tl.where(mask, x1, high), 0), LEVELS)
            s2, z2 = _stored(tl.min(tl.where(mask, x2, low), 0), tl.max(tl.where(mask, x2, high), 0), LEVELS)
            s3, z3 = _stored(tl.min(tl.where(mask, x3, low), 0), tl.max(tl.where(mask, x3, high), 0), LEVELS)
            _store_pairs(pairs, words, inside, s0, z0, stride_row, PAIRS_PER_ROW)
            _store_pairs(pairs, words + NUM_WORDS, inside, s1, z1, stride_row, PAIRS_PER_ROW)
            _store_pairs(pairs, words + 2 * NUM_WORDS, inside, s2, z2, stride_row, PAIRS_PER_ROW)
            _store_pairs(pairs, words + 3 * NUM_WORDS, inside, s3, z3, stride_row, PAIRS_PER_ROW)
            code = _codes(x0, z0[None, :], s0[None, :], LEVELS)
            code |= _codes(x1, z1[None, :], s1[None, :], LEVELS) << 4
            code |= _codes(x2, z2[None, :], s2[None, :], LEVELS) << 8
            code |= _codes(x3, z3[None, :], s3[None, :], LEVELS) << 12
        else:
            least = tl.minimum(tl.minimum(x0, x1), tl.minimum(x2, x3))
            most = tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))
            s, z = _stored(tl.min(tl.where(mask, least, low), 1), tl.max(tl.where(mask, most, high), 1), LEVELS)
            _store_pairs(pairs, tokens, there, s, z, stride_row, PAIRS_PER_ROW)
            scale, lowest = s[:, None], z[:, None]
            code = _codes(x0, lowest, scale, LEVELS)
            code |= _codes(x1, lowest, scale, LEVELS) << 4
            code |= _codes(x2, lowest, scale, LEVELS) << 8
            code |= _codes(x3, lowest, scale, LEVELS) << 12
        rows = tokens // TOKENS_PER_ROW * stride_row + tokens % TOKENS_PER_ROW * NUM_WORDS
        tl.store(target + rows[:, None] + words[None, :], code.to(tl.int16), mask=mask)
