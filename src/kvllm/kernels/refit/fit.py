"""The shift of a head's keys and new values, solved by conjugate gradients, and written with the survivors' move."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from kvllm.kernels.paged import UNALIGNED, layer_ptr, token_offsets
from kvllm.kernels.queries import load_queries, pairs, ring


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _fit_kernel(
    shares, missing, lost, kept,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    numbers, scales, cos, sin, first, second, ring_starts, max_num_reqs, query_scale,
    key_ridge, value_ridge, least_damping,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_KEPT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, RAW_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
    HAS_SCALE: tl.constexpr, FP8_MAX: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STEPS: tl.constexpr, NUM_ROTATIONS: tl.constexpr, HALVES: tl.constexpr, FIT_KEYS: tl.constexpr,
    FIT_VALUES: tl.constexpr, NUM_COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Part NUM_COLUMNS of a head's programs moves its keys; those before, BLOCK_C dimensions of its values each.

    No program reads what another writes, and each reads all that it moves before it writes any of it.
    """
    pid = tl.program_id(0).to(tl.int64)
    batch, part = pid // (NUM_COLUMNS + 1), pid % (NUM_COLUMNS + 1)
    due, layer, head = batch // (NUM_LAYERS * NUM_KV_HEADS), batch // NUM_KV_HEADS % NUM_LAYERS, batch % NUM_KV_HEADS
    block_row = candidate_blocks + due * stride_candidates
    target = tl.arange(0, BLOCK_K)
    valid = target < NUM_KEPT
    source = tl.load(kept + batch * NUM_KEPT + target, mask=valid, other=0)
    source = token_offsets(block_row, source, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    source += head * stride_kv_head
    target = token_offsets(block_row, target, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    target += head * stride_kv_head
    if part < NUM_COLUMNS:
        dims = (part * BLOCK_C).to(tl.int32) + tl.arange(0, BLOCK_C)
        # Survivors along the second axis, where the sums over them cost least.
        mask = (dims < HEAD_DIM)[:, None] & valid[None, :]
        if FIT_VALUES:
            change_scale = 1.0
            if HAS_SCALE:
                change_scale = tl.load(v_scale + layer)
            paged = layer_ptr(value_ptrs, layer, KV_DTYPE, ALIGNMENT)
            values = tl.load(paged + dims[:, None] + source[None, :], mask=mask, other=0.0).to(tl.float32)
            values = _fit_values(
                shares + batch * PADDED_ROWS * BLOCK_K, missing + batch * PADDED_ROWS * HEAD_DIM, values * change_scale,
                dims, value_ridge, tl.maximum(value_ridge, least_damping),
                NUM_KEPT, HEAD_DIM, PADDED_ROWS, PRECISION, STEPS, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
            values = _stored(values, change_scale, KV_DTYPE, HAS_SCALE, FP8_MAX)
            tl.store(paged + dims[:, None] + target[None, :], values, mask=mask)
        else:
            _move(value_ptrs, layer, source[None, :], target[None, :], dims[:, None], mask, RAW_DTYPE, ALIGNMENT)
    else:
        num_pairs: tl.constexpr = HEAD_DIM // 2
        firsts, seconds = pairs(first, second, num_pairs, HALVES, BLOCK_H)
        mask_pairs = valid[:, None] & (tl.arange(0, BLOCK_H) < num_pairs)[None, :]
        if FIT_KEYS:
            change_scale = 1.0
            if HAS_SCALE:
                change_scale = tl.load(k_scale + layer)
            layer_row, oldest = ring(ring_starts, max_num_reqs, due, layer, NUM_ROWS // GROUP_SIZE)
            shift_a, shift_b = _fit_shift(
                numbers, scales, cos, sin, layer, layer_row, oldest, head, firsts, seconds,
                lost + batch * PADDED_ROWS, query_scale, key_ridge, tl.maximum(key_ridge, least_damping),
                NUM_HEADS, GROUP_SIZE, NUM_ROWS, PADDED_ROWS, HEAD_DIM, NUM_ROTATIONS, HALVES, DOT_DTYPE, STEPS,
                BLOCK_R, BLOCK_H,
            )  # fmt: skip
            paged = layer_ptr(key_ptrs, layer, KV_DTYPE, ALIGNMENT)
            keys_a = tl.load(paged + source[:, None] + firsts[None, :], mask=mask_pairs, other=0.0).to(tl.float32)
            keys_b = tl.load(paged + source[:, None] + seconds[None, :], mask=mask_pairs, other=0.0).to(tl.float32)
            keys_a, keys_b = keys_a * change_scale + shift_a[None, :], keys_b * change_scale + shift_b[None, :]
            tl.debug_barrier()
            keys_a = _stored(keys_a, change_scale, KV_DTYPE, HAS_SCALE, FP8_MAX)
            keys_b = _stored(keys_b, change_scale, KV_DTYPE, HAS_SCALE, FP8_MAX)
            tl.store(paged + target[:, None] + firsts[None, :], keys_a, mask=mask_pairs)
            tl.store(paged + target[:, None] + seconds[None, :], keys_b, mask=mask_pairs)
        else:  # half by half: no dimension is in both
            _move(key_ptrs, layer, source[:, None], target[:, None], firsts[None, :], mask_pairs, RAW_DTYPE, ALIGNMENT)
            _move(key_ptrs, layer, source[:, None], target[:, None], seconds[None, :], mask_pairs, RAW_DTYPE, ALIGNMENT)


@triton.jit
def _move(ptrs, layer, source, target, dims, mask, RAW_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """These dimensions of all survivors, bit for bit."""
    paged = layer_ptr(ptrs, layer, RAW_DTYPE, ALIGNMENT)
    moved = tl.load(paged + source + dims, mask=mask)
    tl.debug_barrier()
    tl.store(paged + target + dims, moved, mask=mask)


@triton.jit
def _stored(x, scale, KV_DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, FP8_MAX: tl.constexpr):
    """x in float32 as the cache holds it, rounded as PyTorch does."""
    if HAS_SCALE:
        x = tl.minimum(tl.maximum(tl.div_rn(x, scale), -FP8_MAX), FP8_MAX)
    return x.to(KV_DTYPE)


@triton.jit
def _ratio(a, b):
    """a / b, or 0 if b is 0: a converged column needs no further step."""
    return tl.where(b > 0.0, a / tl.where(b > 0.0, b, 1.0), 0.0)


@triton.jit
def _fit_values(
    shares, missing, values, dims, ridge, damping,
    NUM_KEPT: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """These dimensions of the survivors' values, [BLOCK_C, BLOCK_K], refitted (`kvllm.methods.refit`), transposed.

    damping: the ridge, or LEAST_DAMPING where that is more
    """
    survivors = tl.arange(0, BLOCK_K)
    gram = tl.full([BLOCK_K, BLOCK_K], 0.0, tl.float32)
    residual = tl.full(values.shape, 0.0, tl.float32)
    for start in range(0, PADDED_ROWS, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        share = tl.load(shares + rows[:, None] * BLOCK_K + survivors[None, :])
        target = tl.load(missing + rows[:, None] * HEAD_DIM + dims[None, :], mask=(dims < HEAD_DIM)[None, :], other=0.0)
        gram = tl.dot(tl.trans(share), share, acc=gram, input_precision="ieee")
        residual = tl.dot(tl.trans(target), share, acc=residual, input_precision="ieee")
    diagonal = tl.sum(tl.where(survivors[:, None] == survivors[None, :], gram, 0.0), axis=0)
    mean = tl.sum(diagonal, axis=0) / NUM_KEPT
    strength = ridge * mean
    inverse = _ratio(mean, diagonal + damping * mean)[None, :]
    direction = inverse * residual
    square = tl.sum(residual * direction, axis=1)
    for _ in range(STEPS):
        image = tl.dot(direction, gram, input_precision=PRECISION) + strength * direction
        length = _ratio(square, tl.sum(direction * image, axis=1))
        values += length[:, None] * direction
        residual -= length[:, None] * image
        scaled = inverse * residual
        new_square = tl.sum(residual * scaled, axis=1)
        direction = scaled + _ratio(new_square, square)[:, None] * direction
        square = new_square
    return values


@triton.jit
def _fit_shift(
    numbers, scales, cos, sin, layer, layer_row, oldest, head, firsts, seconds, lost, query_scale, ridge, damping,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_ROTATIONS: tl.constexpr, HALVES: tl.constexpr, DOT_DTYPE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The first and the second dimensions of the vector to add to a head's keys, [BLOCK_H] each; damping: as above."""
    gram_aa = tl.full([BLOCK_H, BLOCK_H], 0.0, tl.float32)
    gram_ab = tl.full([BLOCK_H, BLOCK_H], 0.0, tl.float32)
    gram_bb = tl.full([BLOCK_H, BLOCK_H], 0.0, tl.float32)
    residual_a = tl.full([BLOCK_H], 0.0, tl.float32)
    residual_b = tl.full([BLOCK_H], 0.0, tl.float32)
    for start in range(0, PADDED_ROWS, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        a, b, scale = load_queries(
            numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
            NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, NUM_ROTATIONS, HALVES, tl.float32, BLOCK_H,
        )  # fmt: skip
        scale = (scale * query_scale)[:, None]
        wanted = tl.load(lost + rows)[:, None]
        a, b = a * scale, b * scale
        residual_a += tl.sum(a * wanted, axis=0)
        residual_b += tl.sum(b * wanted, axis=0)
        a, b = a.to(DOT_DTYPE), b.to(DOT_DTYPE)
        gram_aa = tl.dot(tl.trans(a), a, acc=gram_aa, input_precision="ieee")
        gram_ab = tl.dot(tl.trans(a), b, acc=gram_ab, input_precision="ieee")
        gram_bb = tl.dot(tl.trans(b), b, acc=gram_bb, input_precision="ieee")
    indices = tl.arange(0, BLOCK_H)
    same = indices[:, None] == indices[None, :]
    diagonal_a = tl.sum(tl.where(same, gram_aa, 0.0), axis=0)
    diagonal_b = tl.sum(tl.where(same, gram_bb, 0.0), axis=0)
    mean = tl.sum(diagonal_a + diagonal_b, axis=0) / HEAD_DIM
    strength = ridge * mean
    inverse_a = _ratio(mean, diagonal_a + damping * mean)
    inverse_b = _ratio(mean, diagonal_b + damping * mean)
    solution_a = tl.full([BLOCK_H], 0.0, tl.float32)
    solution_b = tl.full([BLOCK_H], 0.0, tl.float32)
    direction_a, direction_b = inverse_a * residual_a, inverse_b * residual_b
    square = tl.sum(residual_a * direction_a + residual_b * direction_b, axis=0)
    for _ in range(STEPS):
        image_a = tl.sum(gram_aa * direction_a[:, None], axis=0) + tl.sum(gram_ab * direction_b[None, :], axis=1)
        image_b = tl.sum(gram_ab * direction_a[:, None], axis=0) + tl.sum(gram_bb * direction_b[:, None], axis=0)
        image_a += strength * direction_a
        image_b += strength * direction_b
        length = _ratio(square, tl.sum(direction_a * image_a + direction_b * image_b, axis=0))
        solution_a += length * direction_a
        solution_b += length * direction_b
        residual_a -= length * image_a
        residual_b -= length * image_b
        scaled_a, scaled_b = inverse_a * residual_a, inverse_b * residual_b
        new_square = tl.sum(residual_a * scaled_a + residual_b * scaled_b, axis=0)
        ratio = _ratio(new_square, square)
        direction_a = scaled_a + ratio * direction_a
        direction_b = scaled_b + ratio * direction_b
        square = new_square
    return solution_a, solution_b
