"""Survivors moved as `compact` does, and fitted on the way to what was evicted (`kvllm.methods.refit`)."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.compression.query_bank import QueryBank
from kvllm.kernels.compact import compact_ref
from kvllm.kernels.paged import PagedCache, layer_ptr, next_power_of_2, token_offsets
from kvllm.kernels.window_scores import (
    _load_queries,
    _load_tile,
    _pairs,
    _ring,
    query_arguments,
    query_sizes,
    turned_queries_ref,
)
from kvllm.kernels.windows import FP8_MAX, gather_window_ref, scatter_rows_ref
from kvllm.layout import ceil_div
from kvllm.methods.kara import MOST_REFITTED
from kvllm.methods.refit import LEAST_KEPT, STEPS, fitted_values, key_shift
from kvllm.methods.rope import Turn

# Requests of one pair of launches: what passes between the two takes about 40 MB a request of an 8B model.
_BATCH = 4
# A head's matrix [num_kept, num_kept], and that of its dimensions, stay in the registers of one program.
MOST_DIMS = 128


def refit_ref(
    bank: QueryBank,
    ring_starts: Tensor,
    kept: Tensor,
    candidate_blocks: Tensor,
    cache: PagedCache,
    turn: Turn | None,
    key_ridge: float,
    value_ridge: float,
) -> None:
    """Candidate j := candidate kept[j], for every head its own, with keys and values refitted as Kara does; in float64.

    ring_starts:      [num_due], `QueryBank.ring_start` of each due request
    kept:             [num_due, num_layers, num_kv_heads, num_kept], ascending
    candidate_blocks: [num_due, num_candidates / block_size], block ids; no block twice
    turn:             of distances [num_queries, 1, group_size], oldest first, for all layers or each its own; None: the
                      queries stay as they are
    key_ridge, value_ridge: 0: the keys, or the values, move bit for bit
    """
    queries = turned_queries_ref(bank, ring_starts, turn).permute(0, 2, 3, 1, 4).flatten(2, 3)
    window = gather_window_ref(candidate_blocks, cache, torch.float64)
    keys, values = (t.transpose(1, 2) for t in window)  # [batch, num_kv_heads, num_candidates, head_dim]
    logits = queries @ keys.transpose(-1, -2) * cache.head_dim**-0.5
    indices = kept.flatten(0, 1).long()
    compact_ref(kept, candidate_blocks, cache)
    if key_ridge > 0:
        own = keys.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, cache.head_dim))
        new = own + key_shift(queries, logits, indices, key_ridge)
        scatter_rows_ref(new.transpose(1, 2), candidate_blocks, cache.keys, cache.k_scale)
    if value_ridge > 0:
        new = fitted_values(logits, values, indices, value_ridge)
        scatter_rows_ref(new.transpose(1, 2), candidate_blocks, cache.values, cache.v_scale)


class Tiles(NamedTuple):
    """How the two launches cut their work."""

    block_q: int  # queries of a program of the first
    block_t: int  # candidates that it sees at once
    attend_warps: int
    attend_stages: int
    block_r: int  # queries that a program of the second sees at once
    block_c: int  # dimensions of the values that it fits
    solve_warps: int
    solve_stages: int


def tiles(num_rows: int, head_dim: int, float32: bool) -> Tiles:
    block_q = min(64, max(16, next_power_of_2(num_rows)))
    block_c = max(16, next_power_of_2(head_dim))
    if float32:  # no tensor cores: small tiles, so that the operands of the plain product fit the registers
        return Tiles(16, 32, 8, 1, 16, 16, 8, 1)
    return Tiles(block_q, 64, 4, 2, block_q, block_c, 8, 2)


def refit(
    bank: QueryBank,
    ring_starts: Tensor,
    kept: Tensor,
    candidate_blocks: Tensor,
    cache: PagedCache,
    turn: Turn | None,
    key_ridge: float,
    value_ridge: float,
) -> None:
    """`refit_ref` in Triton, two launches for every few requests.

    The first has a program for each request, layer, KV head and tile of queries. It finds what the queries get from
    the window and not from the survivors, how they divide their attention among these, and what share of it these have.
    The second solves for a head's values, some dimensions a program, and in one more for the keys' shift, and writes
    them.
    """
    num_layers, _, num_queries, _, head_dim = bank.queries.shape
    num_due, _, num_kv_heads, num_kept = kept.shape
    assert bank.queries.is_contiguous() and kept.is_contiguous() and candidate_blocks.stride(1) == 1
    assert (num_layers, num_kv_heads) == (cache.num_layers, cache.num_kv_heads) == kept.shape[1:3]
    assert num_due == len(ring_starts) == len(candidate_blocks) and head_dim == cache.head_dim
    assert num_kept <= MOST_REFITTED and head_dim <= MOST_DIMS and bank.num_kv_heads == num_kv_heads
    if not num_due:
        return
    float32 = cache.dtype == torch.float32
    num_rows = num_queries * bank.group_size
    sizes = tiles(num_rows, head_dim, float32)
    tallest = max(sizes.block_q, sizes.block_r)
    padded_rows = ceil_div(num_rows, tallest) * tallest
    block_k = max(16, next_power_of_2(num_kept))
    dtype = cache.dot_dtype
    heads, device = num_layers * num_kv_heads, bank.queries.device
    batch = min(num_due, _BATCH) * heads
    shares = missing = lost = None
    if value_ridge > 0:
        shares = torch.empty(batch, padded_rows, block_k, dtype=dtype, device=device)
        missing = torch.empty(batch, padded_rows, head_dim, dtype=dtype, device=device)
    if key_ridge > 0:
        lost = torch.empty(batch, padded_rows, dtype=torch.float32, device=device)
    common = dict(
        **cache.sizes,
        **query_sizes(bank, turn, dtype),
        NUM_KEPT=num_kept,
        PADDED_ROWS=padded_rows,
        FIT_KEYS=key_ridge > 0,
        FIT_VALUES=value_ridge > 0,
        BLOCK_K=block_k,
    )
    parts: Iterable[tuple[Tensor, ...]] = [(candidate_blocks, kept, ring_starts)]
    if num_due > _BATCH:
        parts = zip(*(t.split(_BATCH) for t in (candidate_blocks, kept, ring_starts)), strict=True)
    for blocks, survivors, slots in parts:
        cached, asked = cache.arguments(blocks), query_arguments(bank, slots, turn)
        _attend_kernel[(len(slots) * heads * padded_rows // sizes.block_q,)](
            *(shares, missing, lost, survivors, *cached, *asked, head_dim**-0.5 / math.log(2), LEAST_KEPT),
            NUM_CANDIDATES=candidate_blocks.shape[1] * cache.block_size,
            BLOCK_Q=sizes.block_q,
            BLOCK_T=sizes.block_t,
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            num_warps=sizes.attend_warps,
            num_stages=sizes.attend_stages,
            **common,
        )
        num_columns = ceil_div(head_dim, sizes.block_c)
        _fit_kernel[(len(slots) * heads * (num_columns + 1),)](
            *(shares, missing, lost, survivors, *cached, *asked, head_dim**-0.5, key_ridge, value_ridge),
            STEPS=STEPS,
            RAW_DTYPE=cache.raw_tl_dtype,
            FP8_MAX=FP8_MAX,
            PRECISION="ieee" if float32 else "tf32",
            NUM_COLUMNS=num_columns,
            BLOCK_R=sizes.block_r,
            BLOCK_C=sizes.block_c,
            num_warps=sizes.solve_warps,
            num_stages=sizes.solve_stages,
            **common,
        )


@triton.jit
def _attend_kernel(
    shares, missing, lost, kept,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    numbers, scales, cos, sin, first, second, ring_starts, max_num_reqs, softmax_scale, least_kept,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, NUM_KEPT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
    HAS_SCALE: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr, DOT_DTYPE: tl.constexpr, NUM_TURNS: tl.constexpr, HALVES: tl.constexpr,
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
    firsts, seconds = _pairs(first, second, num_pairs, HALVES, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    layer_row, oldest = _ring(ring_starts, max_num_reqs, due, layer, NUM_ROWS // GROUP_SIZE)
    a, b, scale = _load_queries(
        numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
        NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, NUM_TURNS, DOT_DTYPE, BLOCK_H,
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
        keys_a = _load_tile(key_ptrs, offsets, valid, layer, firsts, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
        keys_b = _load_tile(key_ptrs, offsets, valid, layer, seconds, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
        logits = tl.dot(a, tl.trans(keys_a), input_precision="ieee")
        logits = tl.dot(b, tl.trans(keys_b), acc=logits, input_precision="ieee") * scale
        logits = tl.where(valid[None, :], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        p = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p, axis=1)
        highest = new_highest
        if FIT_VALUES:
            v = _load_tile(value_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(DOT_DTYPE)
            output = tl.dot(p.to(DOT_DTYPE), v, acc=output * shrink[:, None], input_precision="ieee")
    counts = rows < NUM_ROWS
    if FIT_VALUES:
        output = tl.where(counts[:, None], output / total[:, None], 0.0)

    survivors = tl.arange(0, BLOCK_K)
    valid = survivors < NUM_KEPT
    tokens = tl.load(kept + batch * NUM_KEPT + survivors, mask=valid, other=0)
    offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    offsets += head * stride_kv_head
    keys_a = _load_tile(key_ptrs, offsets, valid, layer, firsts, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
    keys_b = _load_tile(key_ptrs, offsets, valid, layer, seconds, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
    logits = tl.dot(a, tl.trans(keys_a), input_precision="ieee")
    logits = tl.dot(b, tl.trans(keys_b), acc=logits, input_precision="ieee") * scale
    logits = tl.where(valid[None, :], logits, float("-inf"))
    highest_kept = tl.max(logits, axis=1)
    p = tl.exp2(logits - highest_kept[:, None])
    total_kept = tl.sum(p, axis=1)
    if FIT_VALUES:
        p = tl.where(counts[:, None], p / total_kept[:, None], 0.0).to(DOT_DTYPE)
        tl.store(shares + (batch * PADDED_ROWS + rows)[:, None] * BLOCK_K + survivors[None, :], p)
        # Subtracted before anything is rounded: what is missing is small beside either.
        v = _load_tile(value_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(DOT_DTYPE)
        output = tl.dot(-p, v, acc=output, input_precision="ieee")
        if HAS_SCALE:
            output *= tl.load(v_scale + layer)
        places = missing + (batch * PADDED_ROWS + rows)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(places, output.to(DOT_DTYPE), mask=(dims < HEAD_DIM)[None, :])
    if FIT_KEYS:
        share = tl.exp2(highest_kept - highest) * total_kept / total
        share = tl.where(counts, -tl.log(tl.maximum(share, least_kept)), 0.0)
        tl.store(lost + batch * PADDED_ROWS + rows, share)


@triton.jit
def _fit_kernel(
    shares, missing, lost, kept,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    numbers, scales, cos, sin, first, second, ring_starts, max_num_reqs, query_scale, key_ridge, value_ridge,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_KEPT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, RAW_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
    HAS_SCALE: tl.constexpr, FP8_MAX: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STEPS: tl.constexpr, NUM_TURNS: tl.constexpr, HALVES: tl.constexpr, FIT_KEYS: tl.constexpr,
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
                dims, value_ridge, NUM_KEPT, HEAD_DIM, PADDED_ROWS, PRECISION, STEPS, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            tl.debug_barrier()
            values = _stored(values, change_scale, KV_DTYPE, HAS_SCALE, FP8_MAX)
            tl.store(paged + dims[:, None] + target[None, :], values, mask=mask)
        else:
            _move(value_ptrs, layer, source[None, :], target[None, :], dims[:, None], mask, RAW_DTYPE, ALIGNMENT)
    else:
        num_pairs: tl.constexpr = HEAD_DIM // 2
        firsts, seconds = _pairs(first, second, num_pairs, HALVES, BLOCK_H)
        mask_pairs = valid[:, None] & (tl.arange(0, BLOCK_H) < num_pairs)[None, :]
        if FIT_KEYS:
            change_scale = 1.0
            if HAS_SCALE:
                change_scale = tl.load(k_scale + layer)
            layer_row, oldest = _ring(ring_starts, max_num_reqs, due, layer, NUM_ROWS // GROUP_SIZE)
            shift_a, shift_b = _fit_shift(
                numbers, scales, cos, sin, layer, layer_row, oldest, head, firsts, seconds,
                lost + batch * PADDED_ROWS, query_scale, key_ridge,
                NUM_HEADS, GROUP_SIZE, NUM_ROWS, PADDED_ROWS, HEAD_DIM, NUM_TURNS, DOT_DTYPE, STEPS, BLOCK_R, BLOCK_H,
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
    """a / b, and 0 where b is: a column that is solved has nowhere left to go."""
    return tl.where(b > 0.0, a / tl.where(b > 0.0, b, 1.0), 0.0)


@triton.jit
def _fit_values(
    shares, missing, values, dims, ridge,
    NUM_KEPT: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """These dimensions of the survivors' values, [BLOCK_C, BLOCK_K], fitted: `fitted_values`, transposed."""
    survivors = tl.arange(0, BLOCK_K)
    gram = tl.full([BLOCK_K, BLOCK_K], 0.0, tl.float32)
    residual = tl.full(values.shape, 0.0, tl.float32)
    for start in range(0, PADDED_ROWS, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        share = tl.load(shares + rows[:, None] * BLOCK_K + survivors[None, :])
        target = tl.load(missing + rows[:, None] * HEAD_DIM + dims[None, :], mask=(dims < HEAD_DIM)[None, :], other=0.0)
        gram = tl.dot(tl.trans(share), share, acc=gram, input_precision="ieee")
        residual = tl.dot(tl.trans(target), share, acc=residual, input_precision="ieee")
    diagonal = tl.where(survivors[:, None] == survivors[None, :], gram, 0.0)
    strength = tl.sum(tl.sum(diagonal, axis=1), axis=0) * (ridge / NUM_KEPT)
    direction = residual
    square = tl.sum(residual * residual, axis=1)
    for _ in range(STEPS):
        image = tl.dot(direction, gram, input_precision=PRECISION) + strength * direction
        length = _ratio(square, tl.sum(direction * image, axis=1))
        values += length[:, None] * direction
        residual -= length[:, None] * image
        new_square = tl.sum(residual * residual, axis=1)
        direction = residual + _ratio(new_square, square)[:, None] * direction
        square = new_square
    return values


@triton.jit
def _fit_shift(
    numbers, scales, cos, sin, layer, layer_row, oldest, head, firsts, seconds, lost, query_scale, ridge,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_TURNS: tl.constexpr, DOT_DTYPE: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The first and the second dimensions of the vector to add to a head's keys, [BLOCK_H] each."""
    gram_aa = tl.full([BLOCK_H, BLOCK_H], 0.0, tl.float32)
    gram_ab = tl.full([BLOCK_H, BLOCK_H], 0.0, tl.float32)
    gram_bb = tl.full([BLOCK_H, BLOCK_H], 0.0, tl.float32)
    residual_a = tl.full([BLOCK_H], 0.0, tl.float32)
    residual_b = tl.full([BLOCK_H], 0.0, tl.float32)
    for start in range(0, PADDED_ROWS, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        a, b, scale = _load_queries(
            numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
            NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, NUM_TURNS, tl.float32, BLOCK_H,
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
    places = tl.arange(0, BLOCK_H)
    diagonal = tl.where(places[:, None] == places[None, :], gram_aa + gram_bb, 0.0)
    strength = tl.sum(tl.sum(diagonal, axis=1), axis=0) * (ridge / HEAD_DIM)
    solution_a = tl.full([BLOCK_H], 0.0, tl.float32)
    solution_b = tl.full([BLOCK_H], 0.0, tl.float32)
    direction_a, direction_b = residual_a, residual_b
    square = tl.sum(residual_a * residual_a + residual_b * residual_b, axis=0)
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
        new_square = tl.sum(residual_a * residual_a + residual_b * residual_b, axis=0)
        ratio = _ratio(new_square, square)
        direction_a = residual_a + ratio * direction_a
        direction_b = residual_b + ratio * direction_b
        square = new_square
    return solution_a, solution_b
