"""The factors of a candidate's attention: the norm of its value, and how dissimilar its key is to the others."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from kvllm.kernels.paged import UNALIGNED, token_offsets
from kvllm.kernels.queries import load_tile, locate


@triton.jit
def _inverse_norms(a, b):
    """1 / norm of each key, [BLOCK_T], from its halves [BLOCK_T, BLOCK_H]; any finite number for a key of zeros."""
    return tl.rsqrt(tl.maximum(tl.sum(a * a + b * b, axis=1), 1e-24))


@triton.jit
def _distinct(a, b, inverse_norms, anchor_a, anchor_b, POWER: tl.constexpr):
    """(1 - cosine of each key to the anchor) ** POWER, [BLOCK_T]; anchor_a, anchor_b: [BLOCK_H], of any norm."""
    length = tl.sum(anchor_a * anchor_a, axis=0) + tl.sum(anchor_b * anchor_b, axis=0)
    along = tl.sum(a * anchor_a[None, :] + b * anchor_b[None, :], axis=1)
    distinct = tl.maximum(1.0 - along * (inverse_norms * tl.rsqrt(tl.maximum(length, 1e-24))), 0.0)
    if POWER == 2.0:
        return distinct * distinct
    else:
        return tl.exp2(POWER * tl.log2(tl.maximum(distinct, 1e-38)))


@triton.jit
def distinct_in_tile(a, b, POWER: tl.constexpr):
    """`_distinct` if these are all the keys."""
    inverse_norms = _inverse_norms(a, b)
    anchor_a, anchor_b = tl.sum(a * inverse_norms[:, None], axis=0), tl.sum(b * inverse_norms[:, None], axis=0)
    return _distinct(a, b, inverse_norms, anchor_a, anchor_b, POWER)


@triton.jit
def value_norms(
    value_ptrs, v_scale, offsets, mask, layer,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The norm of each value, [BLOCK_T]; loaded in two halves, to use fewer registers."""
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, BLOCK_H)
    a = load_tile(value_ptrs, offsets, mask, layer, dims, DTYPE, ALIGNMENT, half).to(tl.float32)
    squares = tl.sum(a * a, axis=1)
    b = load_tile(value_ptrs, offsets, mask, layer, dims + half, DTYPE, ALIGNMENT, half).to(tl.float32)
    squares += tl.sum(b * b, axis=1)
    norms = tl.sqrt(squares)
    if HAS_SCALE:
        norms *= tl.load(v_scale + layer)
    return norms


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _weights_kernel(
    weights,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr,
    VALUE_NORM: tl.constexpr, KEYDIFF_POWER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The factors of each candidate's attention: its value's norm, and its key's distance from the mean key."""
    pid, due, layer, head = locate(NUM_LAYERS, NUM_KV_HEADS)
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, BLOCK_H)
    block_row = candidate_blocks + due * stride_candidates
    anchor_a, anchor_b = tl.full([BLOCK_H], 0.0, tl.float32), tl.full([BLOCK_H], 0.0, tl.float32)
    if KEYDIFF_POWER > 0:
        for start in range(0, NUM_CANDIDATES, BLOCK_T):
            tokens = start + tl.arange(0, BLOCK_T)
            valid = tokens < NUM_CANDIDATES
            offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
            offsets += head * stride_kv_head
            a = load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, half).to(tl.float32)
            b = load_tile(key_ptrs, offsets, valid, layer, dims + half, KV_DTYPE, ALIGNMENT, half).to(tl.float32)
            inverse_norms = _inverse_norms(a, b)
            anchor_a += tl.sum(a * inverse_norms[:, None], axis=0)
            anchor_b += tl.sum(b * inverse_norms[:, None], axis=0)
    for start in range(0, NUM_CANDIDATES, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        valid = tokens < NUM_CANDIDATES
        offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
        offsets += head * stride_kv_head
        weight = tl.full([BLOCK_T], 1.0, tl.float32)
        if VALUE_NORM:
            weight *= value_norms(
                value_ptrs, v_scale, offsets, valid, layer, KV_DTYPE, ALIGNMENT, HAS_SCALE, HEAD_DIM, BLOCK_H
            )
        if KEYDIFF_POWER > 0:
            a = load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, half).to(tl.float32)
            b = load_tile(key_ptrs, offsets, valid, layer, dims + half, KV_DTYPE, ALIGNMENT, half).to(tl.float32)
            weight *= _distinct(a, b, _inverse_norms(a, b), anchor_a, anchor_b, KEYDIFF_POWER)
        tl.store(weights + pid * NUM_CANDIDATES + tokens, weight, mask=valid)
