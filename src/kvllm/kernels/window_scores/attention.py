"""The attention of the stored queries to each candidate, times the candidate's weight."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from kvllm.kernels.paged import UNALIGNED, token_offsets
from kvllm.kernels.queries import load_queries, load_tile, locate, pairs, ring
from kvllm.kernels.window_scores.weights import distinct_in_tile, value_norms


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _scores_kernel(
    scores, weights, log_sums, floor,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    numbers, scales, cos, sin, first, second, ring_starts, max_num_reqs, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, DOT_DTYPE: tl.constexpr,
    NUM_ROTATIONS: tl.constexpr, HALVES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    VALUE_NORM: tl.constexpr, KEYDIFF_POWER: tl.constexpr, SEVERAL_TILES: tl.constexpr,
):  # fmt: skip
    """Attention times weights. With several tiles, weights and log_sums are inputs; with one they are computed here."""
    pid, due, layer, head = locate(NUM_LAYERS, NUM_KV_HEADS)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = tokens < NUM_CANDIDATES
    block_row = candidate_blocks + due * stride_candidates
    offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    offsets += head * stride_kv_head
    num_pairs: tl.constexpr = HEAD_DIM // 2
    firsts, seconds = pairs(first, second, num_pairs, HALVES, BLOCK_H)
    weight = tl.full([BLOCK_T], 1.0, tl.float32)
    if VALUE_NORM and not SEVERAL_TILES:
        weight *= value_norms(
            value_ptrs, v_scale, offsets, valid, layer, KV_DTYPE, ALIGNMENT, HAS_SCALE, HEAD_DIM, BLOCK_H
        )
    keys_a = load_tile(key_ptrs, offsets, valid, layer, firsts, KV_DTYPE, ALIGNMENT, num_pairs)
    keys_b = load_tile(key_ptrs, offsets, valid, layer, seconds, KV_DTYPE, ALIGNMENT, num_pairs)
    if KEYDIFF_POWER > 0 and not SEVERAL_TILES:
        weight *= distinct_in_tile(keys_a.to(tl.float32), keys_b.to(tl.float32), KEYDIFF_POWER)
    keys_a, keys_b = tl.trans(keys_a.to(DOT_DTYPE)), tl.trans(keys_b.to(DOT_DTYPE))
    if HAS_SCALE:
        softmax_scale *= tl.load(k_scale + layer)
    if not SEVERAL_TILES:  # spilled to the output, since the loop needs the registers
        tl.store(scores + pid * NUM_CANDIDATES + tokens, weight, mask=valid)
        tl.debug_barrier()

    layer_row, oldest = ring(ring_starts, max_num_reqs, due, layer, NUM_ROWS // GROUP_SIZE)
    # A thread holds rows r and r + 8 of every 16 rows of a product, so these are added within its registers. Sums
    # across threads follow after the loop.
    total = tl.full([BLOCK_Q // 16, 8, BLOCK_T], 0.0, tl.float32)
    for start in range(0, NUM_ROWS, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        a, b, scale = load_queries(
            numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
            NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, NUM_ROTATIONS, HALVES, DOT_DTYPE, BLOCK_H,
        )  # fmt: skip
        logits = tl.dot(a, keys_a, input_precision="ieee")
        logits = tl.dot(b, keys_b, acc=logits, input_precision="ieee")
        if NUM_CANDIDATES % BLOCK_T > 0:
            logits = tl.where(valid[None, :], logits, float("-inf"))
        # Scaling and subtracting become one instruction. The lower bound avoids -inf * 0 for a query of zeros.
        scale = tl.maximum(scale * softmax_scale, 1e-30)
        if SEVERAL_TILES:
            log_sum = tl.load(log_sums + pid * NUM_ROWS + rows, mask=rows < NUM_ROWS, other=0.0)
            p = tl.exp2(logits * scale[:, None] - log_sum[:, None])
            row_weight = tl.where(rows < NUM_ROWS, 1.0, 0.0)
        else:
            highest = tl.max(logits, axis=1) * scale
            p = tl.exp2(logits * scale[:, None] - highest[:, None])
            row_weight = tl.where(rows < NUM_ROWS, 1.0 / tl.sum(p, axis=1), 0.0)
        total += tl.sum(tl.reshape(p * row_weight[:, None], [BLOCK_Q // 16, 2, 8, BLOCK_T]), axis=1)
    # The mean over the queries and the heads of the group.
    score = tl.sum(tl.sum(total, axis=1), axis=0) * (1.0 / NUM_ROWS) + floor
    parked = weights if SEVERAL_TILES else scores
    weight = tl.load(parked + pid * NUM_CANDIDATES + tokens, mask=valid, other=0.0)
    tl.store(scores + pid * NUM_CANDIDATES + tokens, score * weight, mask=valid)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _log_sums_kernel(
    log_sums,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    numbers, scales, cos, sin, first, second, ring_starts, max_num_reqs, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, DOT_DTYPE: tl.constexpr,
    NUM_ROTATIONS: tl.constexpr, HALVES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """log2 of the sum over all candidates of 2^logit, for a tile of queries."""
    pid, due, layer, head = locate(NUM_LAYERS, NUM_KV_HEADS)
    num_pairs: tl.constexpr = HEAD_DIM // 2
    firsts, seconds = pairs(first, second, num_pairs, HALVES, BLOCK_H)
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    layer_row, oldest = ring(ring_starts, max_num_reqs, due, layer, NUM_ROWS // GROUP_SIZE)
    a, b, scale = load_queries(
        numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
        NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, NUM_ROTATIONS, HALVES, DOT_DTYPE, BLOCK_H,
    )  # fmt: skip
    if HAS_SCALE:
        softmax_scale *= tl.load(k_scale + layer)
    scale = (scale * softmax_scale)[:, None]

    block_row = candidate_blocks + due * stride_candidates
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
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
        total = total * tl.exp2(highest - new_highest) + tl.sum(tl.exp2(logits - new_highest[:, None]), axis=1)
        highest = new_highest
    tl.store(log_sums + pid * NUM_ROWS + rows, highest + tl.log2(total), mask=rows < NUM_ROWS)
