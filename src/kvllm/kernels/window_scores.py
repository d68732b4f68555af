"""Bidirectional scores of the candidates of every request due in a step, for all layers in one launch, or three."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvllm.compression.query_bank import QueryBank
from kvllm.kernels.paged import TL_DTYPES, PagedCache, layer_ptr, next_power_of_2, token_offsets
from kvllm.kernels.windows import gather_window_ref
from kvllm.layout import ceil_div
from kvllm.methods.rope import Turn

# A key tile of this size fits twice into the shared memory of a multiprocessor of a Hopper or Ampere GPU, beside the
# queries: two programs share one, so that one computes while the other loads.
_TILE_BYTES = 64 * 1024


def window_scores_ref(
    bank: QueryBank,
    ring_starts: Tensor,
    candidate_blocks: Tensor,
    cache: PagedCache,
    value_norm: bool = True,
    keydiff_power: float = 0.0,
    attention_floor: float = 0.0,
    turn: Turn | None = None,
) -> Tensor:
    """How much the queries of a request look at each of its candidates, weighted as `Kara.score` does; in float64.

    ring_starts:      [num_due], `QueryBank.ring_start` of each due request
    candidate_blocks: [num_due, num_candidates / block_size], block ids
    turn:             of distances [num_queries, 1, group_size], oldest first, for all layers or each its own; None: the
                      queries stay as they are
    returns           [num_due, num_layers, num_kv_heads, num_candidates] in float32
    """
    grouped = turned_queries_ref(bank, ring_starts, turn)
    keys, values = gather_window_ref(candidate_blocks, cache, torch.float64)
    logits = torch.einsum("bqhgd,bthd->bhgqt", grouped, keys) * cache.head_dim**-0.5
    scores = logits.softmax(dim=-1).mean(dim=(2, 3))  # over the heads of a group and the queries
    scores = scores + attention_floor / keys.shape[1]
    if value_norm:
        scores = scores * values.norm(dim=-1).transpose(1, 2)
    if keydiff_power > 0:
        anchor = normalize(keys, dim=-1).mean(dim=1, keepdim=True)
        cosines = cosine_similarity(keys, anchor, dim=-1).transpose(1, 2)
        scores = scores * (1 - cosines).clamp(min=0) ** keydiff_power
    return scores.float().unflatten(0, (len(ring_starts), cache.num_layers))


def turned_queries_ref(bank: QueryBank, ring_starts: Tensor, turn: Turn | None) -> Tensor:
    """[num_due * num_layers, num_queries, num_kv_heads, group_size, head_dim] in float64."""
    queries = bank.of(ring_starts.long()).transpose(0, 1).flatten(0, 1).double()
    grouped = queries.unflatten(2, (bank.num_kv_heads, -1))
    if turn is None:
        return grouped
    # [num_due, num_layers, num_queries, num_kv_heads, group_size, head_dim], to which both forms of `turn` broadcast
    return turn.apply(grouped.unflatten(0, (len(ring_starts), -1))).flatten(0, 1)


def query_arguments(bank: QueryBank, ring_starts: Tensor, turn: Turn | None) -> tuple[Any, ...]:
    """What `_load_queries` needs to find them, from `numbers` to `max_num_reqs`."""
    turns = (turn.cos, turn.sin, turn.first, turn.second) if turn else (None, None, None, None)
    return (bank.queries, bank.scales, *turns, ring_starts, bank.queries.shape[1])


def query_sizes(bank: QueryBank, turn: Turn | None, dot_dtype: torch.dtype) -> dict[str, Any]:
    """The constants that go with `query_arguments`."""
    _, _, num_queries, num_heads, head_dim = bank.queries.shape
    return dict(
        NUM_HEADS=num_heads,
        GROUP_SIZE=bank.group_size,
        NUM_ROWS=num_queries * bank.group_size,
        DOT_DTYPE=TL_DTYPES[dot_dtype],
        NUM_TURNS=num_turns(turn),
        HALVES=turn is None or turn.halves,
        BLOCK_H=max(16, next_power_of_2(head_dim // 2)),
    )


def num_turns(turn: Turn | None) -> int:
    """Tables of sines and cosines: none, one for all layers, or one a layer."""
    if turn is None:
        return 0
    return turn.cos.shape[0] if turn.cos.ndim > 4 else 1


def window_scores(
    bank: QueryBank,
    ring_starts: Tensor,
    candidate_blocks: Tensor,
    cache: PagedCache,
    value_norm: bool = True,
    keydiff_power: float = 0.0,
    attention_floor: float = 0.0,
    turn: Turn | None = None,
) -> Tensor:
    """`window_scores_ref` in Triton, with a program for each request, layer, KV head and tile of candidates.

    Where the candidates fit one tile this is one launch, which reads every key and value once. Where they do not, a
    launch before it finds what weights the candidates, and another every query's denominator.
    """
    num_layers, _, _, _, head_dim = bank.queries.shape
    num_due, num_candidates = len(ring_starts), candidate_blocks.shape[1] * cache.block_size
    assert bank.queries.is_contiguous() and candidate_blocks.stride(1) == 1 and head_dim == cache.head_dim
    assert num_layers == cache.num_layers and len(candidate_blocks) == num_due
    assert bank.num_kv_heads == cache.num_kv_heads
    device = bank.queries.device
    batch, num_rows = num_due * num_layers * cache.num_kv_heads, bank.num_queries * bank.group_size
    scores = torch.empty(num_due, num_layers, cache.num_kv_heads, num_candidates, dtype=torch.float32, device=device)
    if not batch:
        return scores

    cached = cache.arguments(candidate_blocks)
    # Of 8 warps, each four would turn all the queries for their half of the keys.
    sizes = cache.sizes | dict(NUM_CANDIDATES=num_candidates, num_warps=4)
    weighting = dict(VALUE_NORM=value_norm, KEYDIFF_POWER=float(keydiff_power))
    asking = query_sizes(bank, turn, cache.dot_dtype)
    block_h = asking["BLOCK_H"]
    block_t, block_q = tile_sizes(num_candidates, num_rows, 2 * block_h, cache.dtype == torch.float32)
    num_tiles = ceil_div(num_candidates, block_t)
    exponent = head_dim**-0.5 / math.log(2)  # exp2 is cheaper than exp
    asked = (*query_arguments(bank, ring_starts, turn), exponent)
    asking |= dict(BLOCK_T=block_t, BLOCK_Q=block_q, num_stages=3)  # of 2 and 3 stages on an H100
    weights = log_sums = None
    if num_tiles > 1:
        weights = torch.empty(batch, num_candidates, dtype=torch.float32, device=device)
        _weights_kernel[(batch,)](weights, *cached, BLOCK_T=64, BLOCK_H=block_h, **weighting, **sizes)
        log_sums = torch.empty(batch, num_rows, dtype=torch.float32, device=device)
        _log_sums_kernel[(batch, ceil_div(num_rows, block_q))](log_sums, *cached, *asked, **asking, **sizes)
    _scores_kernel[(batch, num_tiles)](
        scores,
        weights,
        log_sums,
        attention_floor / num_candidates,
        *cached,
        *asked,
        SEVERAL_TILES=num_tiles > 1,
        **weighting,
        **asking,
        **sizes,
    )
    return scores


def tile_sizes(num_candidates: int, num_rows: int, block_d: int, float32: bool) -> tuple[int, int]:
    """Candidates a tile, and queries a tile."""
    if float32:  # no tensor cores: small tiles, so that the operands of the plain product fit the registers
        return 32, 32
    block_q = min(64, max(16, next_power_of_2(num_rows)))
    resident = max(16, next_power_of_2(num_candidates))
    if resident * block_d * 2 <= _TILE_BYTES:
        return resident, block_q
    return 64 if block_d > 128 else 128, block_q


@triton.jit
def _locate(NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """This program's place in the batch, request, layer and KV head; neighbours share the lines of a block."""
    pid = tl.program_id(0).to(tl.int64)
    return pid, pid // (NUM_LAYERS * NUM_KV_HEADS), pid // NUM_KV_HEADS % NUM_LAYERS, pid % NUM_KV_HEADS


@triton.jit
def _load_tile(ptrs, offsets, mask, layer, dims, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, NUM_DIMS: tl.constexpr):
    """[BLOCK_T, len(dims)]: the first NUM_DIMS of these dimensions of the candidates' keys or values; zeros outside."""
    rows = layer_ptr(ptrs, layer, DTYPE, ALIGNMENT) + offsets[:, None] + dims[None, :]
    places = tl.arange(0, dims.shape[0])
    return tl.load(rows, mask=mask[:, None] & (places < NUM_DIMS)[None, :], other=0.0)


@triton.jit
def _pairs(first, second, NUM_PAIRS: tl.constexpr, HALVES: tl.constexpr, BLOCK_H: tl.constexpr):
    """The dimensions that turn together, [BLOCK_H] each; int32, which takes half the registers."""
    pairs = tl.arange(0, BLOCK_H)
    if HALVES:
        firsts, seconds = pairs, pairs + NUM_PAIRS
    else:
        firsts = tl.load(first + pairs, mask=pairs < NUM_PAIRS, other=0).to(tl.int32)
        seconds = tl.load(second + pairs, mask=pairs < NUM_PAIRS, other=0).to(tl.int32)
    return firsts, seconds


@triton.jit
def _ring(ring_starts, max_num_reqs, due, layer, NUM_QUERIES: tl.constexpr):
    """Of a request in a layer: its row among the bank's (layer, row) pairs, and the slot of its oldest query."""
    start = tl.load(ring_starts + due).to(tl.int32)
    return layer * max_num_reqs + start // NUM_QUERIES, start % NUM_QUERIES


@triton.jit
def _load_queries(
    numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_TURNS: tl.constexpr, DOT_DTYPE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The first and the second dimensions of the turned queries, [BLOCK_Q, BLOCK_H] each, and their scales [BLOCK_Q].

    Row r is query r // GROUP_SIZE, oldest first, of the group's head r % GROUP_SIZE. layer_row, oldest: of `_ring`.
    """
    num_queries: tl.constexpr = NUM_ROWS // GROUP_SIZE
    num_pairs: tl.constexpr = HEAD_DIM // 2
    slots = (oldest + rows // GROUP_SIZE) % num_queries
    vectors = (layer_row * num_queries + slots) * NUM_HEADS + head * GROUP_SIZE + rows % GROUP_SIZE
    pairs = tl.arange(0, BLOCK_H)
    mask = (rows < NUM_ROWS)[:, None] & (pairs < num_pairs)[None, :]
    numbers += vectors[:, None] * HEAD_DIM
    a = tl.load(numbers + firsts[None, :], mask=mask, other=0).to(tl.float32)
    b = tl.load(numbers + seconds[None, :], mask=mask, other=0).to(tl.float32)
    if NUM_TURNS > 0:
        if NUM_TURNS > 1:
            cos += layer * NUM_ROWS * num_pairs
            sin += layer * NUM_ROWS * num_pairs
        angles = rows[:, None] * num_pairs + pairs[None, :]
        c = tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angles, mask=mask, other=0.0).to(tl.float32)
        a, b = a * c - b * s, a * s + b * c
    return a.to(DOT_DTYPE), b.to(DOT_DTYPE), tl.load(scales + vectors, mask=rows < NUM_ROWS, other=0.0)


@triton.jit
def _inverse_norms(a, b):
    """[BLOCK_T]: 1 / length of each key, of its halves [BLOCK_T, BLOCK_H]; of a key of zeros any number will do."""
    return tl.rsqrt(tl.maximum(tl.sum(a * a + b * b, axis=1), 1e-24))


@triton.jit
def _distinct(a, b, inverse_norms, anchor_a, anchor_b, POWER: tl.constexpr):
    """[BLOCK_T]: (1 - cosine of each key to the anchor) ** POWER; anchor_a, anchor_b: [BLOCK_H], of any length."""
    length = tl.sum(anchor_a * anchor_a, axis=0) + tl.sum(anchor_b * anchor_b, axis=0)
    along = tl.sum(a * anchor_a[None, :] + b * anchor_b[None, :], axis=1)
    distinct = tl.maximum(1.0 - along * (inverse_norms * tl.rsqrt(tl.maximum(length, 1e-24))), 0.0)
    if POWER == 2.0:
        return distinct * distinct
    else:
        return tl.exp2(POWER * tl.log2(tl.maximum(distinct, 1e-38)))


@triton.jit
def _distinct_in_tile(a, b, POWER: tl.constexpr):
    """`_distinct` where these are all the keys."""
    inverse_norms = _inverse_norms(a, b)
    anchor_a, anchor_b = tl.sum(a * inverse_norms[:, None], axis=0), tl.sum(b * inverse_norms[:, None], axis=0)
    return _distinct(a, b, inverse_norms, anchor_a, anchor_b, POWER)


@triton.jit
def _value_norms(
    value_ptrs, v_scale, offsets, mask, layer,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T]: length of each value; a half at a time, so that fewer registers hold it."""
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, BLOCK_H)
    a = _load_tile(value_ptrs, offsets, mask, layer, dims, DTYPE, ALIGNMENT, half).to(tl.float32)
    squares = tl.sum(a * a, axis=1)
    b = _load_tile(value_ptrs, offsets, mask, layer, dims + half, DTYPE, ALIGNMENT, half).to(tl.float32)
    squares += tl.sum(b * b, axis=1)
    norms = tl.sqrt(squares)
    if HAS_SCALE:
        norms *= tl.load(v_scale + layer)
    return norms


@triton.jit
def _weights_kernel(
    weights,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr,
    VALUE_NORM: tl.constexpr, KEYDIFF_POWER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What a candidate's attention is multiplied by: its value's norm, and its key's distance from the mean key."""
    pid, due, layer, head = _locate(NUM_LAYERS, NUM_KV_HEADS)
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
            a = _load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, half).to(tl.float32)
            b = _load_tile(key_ptrs, offsets, valid, layer, dims + half, KV_DTYPE, ALIGNMENT, half).to(tl.float32)
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
            weight *= _value_norms(
                value_ptrs, v_scale, offsets, valid, layer, KV_DTYPE, ALIGNMENT, HAS_SCALE, HEAD_DIM, BLOCK_H
            )
        if KEYDIFF_POWER > 0:
            a = _load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, half).to(tl.float32)
            b = _load_tile(key_ptrs, offsets, valid, layer, dims + half, KV_DTYPE, ALIGNMENT, half).to(tl.float32)
            weight *= _distinct(a, b, _inverse_norms(a, b), anchor_a, anchor_b, KEYDIFF_POWER)
        tl.store(weights + pid * NUM_CANDIDATES + tokens, weight, mask=valid)


@triton.jit
def _scores_kernel(
    scores, weights, log_sums, floor,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    numbers, scales, cos, sin, first, second, ring_starts, max_num_reqs, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, DOT_DTYPE: tl.constexpr,
    NUM_TURNS: tl.constexpr, HALVES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
    VALUE_NORM: tl.constexpr, KEYDIFF_POWER: tl.constexpr, SEVERAL_TILES: tl.constexpr,
):  # fmt: skip
    """Attention times weights; of several tiles each, weights and log_sums are given, of one they are found here."""
    pid, due, layer, head = _locate(NUM_LAYERS, NUM_KV_HEADS)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = tokens < NUM_CANDIDATES
    block_row = candidate_blocks + due * stride_candidates
    offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    offsets += head * stride_kv_head
    num_pairs: tl.constexpr = HEAD_DIM // 2
    firsts, seconds = _pairs(first, second, num_pairs, HALVES, BLOCK_H)
    weight = tl.full([BLOCK_T], 1.0, tl.float32)
    if VALUE_NORM and not SEVERAL_TILES:
        weight *= _value_norms(
            value_ptrs, v_scale, offsets, valid, layer, KV_DTYPE, ALIGNMENT, HAS_SCALE, HEAD_DIM, BLOCK_H
        )
    keys_a = _load_tile(key_ptrs, offsets, valid, layer, firsts, KV_DTYPE, ALIGNMENT, num_pairs)
    keys_b = _load_tile(key_ptrs, offsets, valid, layer, seconds, KV_DTYPE, ALIGNMENT, num_pairs)
    if KEYDIFF_POWER > 0 and not SEVERAL_TILES:
        weight *= _distinct_in_tile(keys_a.to(tl.float32), keys_b.to(tl.float32), KEYDIFF_POWER)
    keys_a, keys_b = tl.trans(keys_a.to(DOT_DTYPE)), tl.trans(keys_b.to(DOT_DTYPE))
    if HAS_SCALE:
        softmax_scale *= tl.load(k_scale + layer)
    if not SEVERAL_TILES:  # parked where the scores will stand: the loop needs the registers
        tl.store(scores + pid * NUM_CANDIDATES + tokens, weight, mask=valid)
        tl.debug_barrier()

    layer_row, oldest = _ring(ring_starts, max_num_reqs, due, layer, NUM_ROWS // GROUP_SIZE)
    # A thread holds rows r and r + 8 of each 16 of a product, so these are added in its registers; only after the loop
    # are the rest, of other threads.
    total = tl.full([BLOCK_Q // 16, 8, BLOCK_T], 0.0, tl.float32)
    for start in range(0, NUM_ROWS, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        a, b, scale = _load_queries(
            numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
            NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, NUM_TURNS, DOT_DTYPE, BLOCK_H,
        )  # fmt: skip
        logits = tl.dot(a, keys_a, input_precision="ieee")
        logits = tl.dot(b, keys_b, acc=logits, input_precision="ieee")
        if NUM_CANDIDATES % BLOCK_T > 0:
            logits = tl.where(valid[None, :], logits, float("-inf"))
        # Scaled in the same instruction that subtracts. The floor: a row of zeros shall have no -inf * 0.
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


@triton.jit
def _log_sums_kernel(
    log_sums,
    candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    numbers, scales, cos, sin, first, second, ring_starts, max_num_reqs, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, DOT_DTYPE: tl.constexpr,
    NUM_TURNS: tl.constexpr, HALVES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """log2 of the sum over all candidates of 2^logit, for a tile of queries."""
    pid, due, layer, head = _locate(NUM_LAYERS, NUM_KV_HEADS)
    num_pairs: tl.constexpr = HEAD_DIM // 2
    firsts, seconds = _pairs(first, second, num_pairs, HALVES, BLOCK_H)
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    layer_row, oldest = _ring(ring_starts, max_num_reqs, due, layer, NUM_ROWS // GROUP_SIZE)
    a, b, scale = _load_queries(
        numbers, scales, cos, sin, rows, layer, layer_row, oldest, head, firsts, seconds,
        NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, NUM_TURNS, DOT_DTYPE, BLOCK_H,
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
        keys_a = _load_tile(key_ptrs, offsets, valid, layer, firsts, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
        keys_b = _load_tile(key_ptrs, offsets, valid, layer, seconds, KV_DTYPE, ALIGNMENT, num_pairs).to(DOT_DTYPE)
        logits = tl.dot(a, tl.trans(keys_a), input_precision="ieee")
        logits = tl.dot(b, tl.trans(keys_b), acc=logits, input_precision="ieee") * scale
        logits = tl.where(valid[None, :], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp2(highest - new_highest) + tl.sum(tl.exp2(logits - new_highest[:, None]), axis=1)
        highest = new_highest
    tl.store(log_sums + pid * NUM_ROWS + rows, highest + tl.log2(total), mask=rows < NUM_ROWS)
