"""What queries get from a window and not from its survivors, and how they divide their attention among these."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from kvllm.kernels.paged import UNALIGNED, token_offsets
from kvllm.kernels.queries import load_queries, load_tile, pairs, ring


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _attend_kernel(
    shares, missing, lost, kept,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    numbers, scales, cos, sin, first, second, ring_starts, max_num_reqs, softmax_scale, least_kept,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, NUM_KEPT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
    HAS_SCALE: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr, DOT_DTYPE: tl.constexpr, NUM_ROTATIONS: tl.constexpr, HALVES: tl.constexpr,
    FIT_KEYS: tl.constexpr, FIT_VALUES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a tile of queries, with zeros in the rows past the last:

    shares  [batch, PADDED_ROWS, BLOCK_K]: how a query divides its attention among the survivors, which sums to 1
    missing [batch, PADDED_ROWS, HEAD_DIM]: what it gets from the window, less what the survivors bring
    lost    [batch, PADDED_ROWS]: -log of the share of the survivors
    """
    pid = tl.program_id(0).to(tl.int64)  # the tiles of one head are neighbours and share its keys in the L2 cache
    batch, tile = pid // (PADDED_ROWS // BLOCK_Q), pid % (PADDED_ROWS // BLOCK_Q)
    due, layer, head = batch // (NUM_LAYERS * NUM_KV_HEADS), batch // NUM_KV_HEADS % NUM_LAYERS, batch % NUM_KV_HEADS
    block_row = candidate_blocks + due * stride_candidates
    num_pairs: tl.constexpr = HEAD_DIM // 2
    firsts, seconds = pairs(first, second, num_pairs, HALVES, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    layer_row, oldest = ring(ring_starts, max_num_reqs, due, layer, NUM_ROWS // GROUP_SIZE)
    a, b, scale = load_queries(
        numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
        NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, NUM_ROTATIONS, HALVES, DOT_DTYPE, BLOCK_H,
    )  # fmt: skip
    if HAS_SCALE:
        softmax_scale *= tl.load(k_scale + layer)
    scale = (scale * softmax_scale)[:, None]

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    output = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)
    for start in range(0, NUM_CANDIDATES, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        valid = tokens < NUM_CANDIDATES
        offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
        offsets += head * stride_kv_head
        keys_a = load_tile(key_ptrs, offsets, valid, layer, firsts, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
        keys_b = load_tile(key_ptrs, offsets, valid, layer, seconds, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
        logits = tl.dot(a, tl.trans(keys_a), input_precision="ieee")
        logits = tl.dot(b, tl.trans(keys_b), acc=logits, input_precision="ieee") * scale
        logits = tl.where(valid[None, :], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        p = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p, axis=1)
        highest = new_highest
        if FIT_VALUES:
            v = load_tile(value_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(DOT_DTYPE)
            output = tl.dot(p.to(DOT_DTYPE), v, acc=output * shrink[:, None], input_precision="ieee")
    counts = rows < NUM_ROWS
    if FIT_VALUES:
        output = tl.where(counts[:, None], output / total[:, None], 0.0)

    survivors = tl.arange(0, BLOCK_K)
    valid = survivors < NUM_KEPT
    tokens = tl.load(kept + batch * NUM_KEPT + survivors, mask=valid, other=0)
    offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    offsets += head * stride_kv_head
    keys_a = load_tile(key_ptrs, offsets, valid, layer, firsts, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
    keys_b = load_tile(key_ptrs, offsets, valid, layer, seconds, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
    logits = tl.dot(a, tl.trans(keys_a), input_precision="ieee")
    logits = tl.dot(b, tl.trans(keys_b), acc=logits, input_precision="ieee") * scale
    logits = tl.where(valid[None, :], logits, float("-inf"))
    highest_kept = tl.max(logits, axis=1)
    p = tl.exp2(logits - highest_kept[:, None])
    total_kept = tl.sum(p, axis=1)
    if FIT_VALUES:
        p = tl.where(counts[:, None], p / total_kept[:, None], 0.0).to(DOT_DTYPE)
        tl.store(shares + (batch * PADDED_ROWS + rows)[:, None] * BLOCK_K + survivors[None, :], p)
        # Subtracted before rounding: the difference is small compared with either term.
        v = load_tile(value_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(DOT_DTYPE)
        output = tl.dot(-p, v, acc=output, input_precision="ieee")
        if HAS_SCALE:
            output *= tl.load(v_scale + layer)
        targets = missing + (batch * PADDED_ROWS + rows)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(targets, output.to(DOT_DTYPE), mask=(dims < HEAD_DIM)[None, :])
    if FIT_KEYS:
        share = tl.exp2(highest_kept - highest) * total_kept / total
        share = tl.where(counts, -tl.log(tl.maximum(share, least_kept)), 0.0)
        tl.store(lost + batch * PADDED_ROWS + rows, share)
