"""Bidirectional scores of the candidates of every request due in a step, for all layers in one launch or two."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvllm.kernels.paged import INTERPRETED, PagedCache, layer_ptr, token_offsets
from kvllm.kernels.windows import gather_window_ref
from kvllm.methods.rope import Rope
from kvllm.query_bank import QueryBank

# A key tile of this size fits twice into the shared memory of a multiprocessor of a Hopper or Ampere GPU, beside the
# queries: two programs share one, so that one computes while the other loads.
_TILE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Turn:
    """What turns the queries of an event: row r is query r // group_size of its group's head r % group_size.

    cos, sin: [num_queries * group_size, head_dim] in float32; partner: [head_dim] (`kvllm.methods.rope.Rope.tables`)
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    @classmethod
    def by(cls, distances: Tensor, rope: Rope, head_dim: int) -> Turn:
        """distances: [num_queries, group_size], tokens"""
        cos, sin, partner = rope.tables(distances, head_dim)
        return cls(cos.flatten(0, 1), sin.flatten(0, 1), partner.int())


def window_scores_ref(
    bank: QueryBank,
    req_slots: Tensor,
    candidate_blocks: Tensor,
    cache: PagedCache,
    value_norm: bool = True,
    keydiff_power: float = 0.0,
    turn: Turn | None = None,
) -> Tensor:
    """How much the queries of a request look at each of its candidates, weighted as `Kara.score` does; in float64.

    req_slots:        [num_due], each due request's row in the bank
    candidate_blocks: [num_due, num_candidates / block_size], block ids
    turn:             None: the queries stay as they are
    returns           [num_due, num_layers, num_kv_heads, num_candidates] in float32
    """
    queries = bank.of(req_slots.long()).transpose(0, 1).flatten(0, 1).double()
    keys, values = gather_window_ref(candidate_blocks, cache, torch.float64)
    grouped = queries.unflatten(2, (cache.num_kv_heads, -1))  # [batch, num_queries, num_kv_heads, group, head_dim]
    if turn is not None:
        shape = (bank.num_queries, 1, bank.group_size, cache.head_dim)
        grouped = grouped * turn.cos.view(shape) + grouped[..., turn.partner.long()] * turn.sin.view(shape)
    logits = torch.einsum("bqhgd,bthd->bhgqt", grouped, keys) * cache.head_dim**-0.5
    scores = logits.softmax(dim=-1).mean(dim=(2, 3))  # over the heads of a group and the queries
    if value_norm:
        scores = scores * values.norm(dim=-1).transpose(1, 2)
    if keydiff_power > 0:
        anchor = normalize(keys, dim=-1).mean(dim=1, keepdim=True)
        cosines = cosine_similarity(keys, anchor, dim=-1).transpose(1, 2)
        scores = scores * (1 - cosines).clamp(min=0) ** keydiff_power
    return scores.float().unflatten(0, (len(req_slots), cache.num_layers))


def window_scores(
    bank: QueryBank,
    req_slots: Tensor,
    candidate_blocks: Tensor,
    cache: PagedCache,
    value_norm: bool = True,
    keydiff_power: float = 0.0,
    turn: Turn | None = None,
) -> Tensor:
    """`window_scores_ref` as a Triton kernel, one program per request, layer, KV head and tile of candidates.

    Where the candidates fit one tile, their keys are read once and stay on chip. Where they do not, a first launch
    finds the softmax' denominator of every query, and one more the mean key.
    """
    num_layers, _, num_queries, num_heads, head_dim = bank.queries.shape
    num_due, num_candidates = len(req_slots), candidate_blocks.shape[1] * cache.block_size
    assert bank.queries.is_contiguous() and candidate_blocks.stride(1) == 1 and head_dim == cache.head_dim
    assert num_layers == cache.num_layers and len(candidate_blocks) == num_due
    assert bank.num_kv_heads == cache.num_kv_heads
    device = bank.queries.device
    batch, num_rows = num_due * num_layers * cache.num_kv_heads, num_queries * bank.group_size
    scores = torch.empty(num_due, num_layers, cache.num_kv_heads, num_candidates, dtype=torch.float32, device=device)
    if not batch:
        return scores

    float32 = cache.dtype == torch.float32
    dot_dtype = tl.float16 if cache.dtype == torch.float16 else tl.bfloat16
    if float32 or INTERPRETED:  # the interpreter's dot takes the bits of bf16 for integers
        dot_dtype = tl.float32
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_t, block_q, num_warps = tile_sizes(num_candidates, num_rows, block_d, float32)
    num_tiles = triton.cdiv(num_candidates, block_t)
    several = num_tiles > 1
    arguments = (
        *(bank.queries, bank.scales, *((turn.cos, turn.sin, turn.partner) if turn else (None, None, None))),
        *(req_slots, candidate_blocks, cache.key_ptrs, cache.value_ptrs, cache.k_scale, cache.v_scale),
        bank.queries.shape[1],
        candidate_blocks.stride(0),
        *cache.strides,
        head_dim**-0.5 / math.log(2),  # exp2 is cheaper than exp
    )
    sizes = dict(
        NUM_LAYERS=num_layers,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=cache.num_kv_heads,
        GROUP_SIZE=bank.group_size,
        NUM_ROWS=num_rows,
        NUM_CANDIDATES=num_candidates,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=cache.block_size,
        KV_DTYPE=cache.tl_dtype,
        ALIGNMENT=cache.alignment,
        DOT_DTYPE=dot_dtype,
        HAS_SCALE=cache.k_scale is not None,
        TURN=turn is not None,
        BLOCK_T=block_t,
        BLOCK_Q=block_q,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=2,
    )
    log_sums = anchors = None
    if several:
        log_sums = torch.empty(batch, num_rows, dtype=torch.float32, device=device)
        _log_sums_kernel[(batch, triton.cdiv(num_rows, block_q))](log_sums, *arguments, **sizes)
    if several and keydiff_power > 0:
        anchors = torch.empty(batch, block_d, dtype=torch.float32, device=device)
        _anchors_kernel[(batch,)](anchors, *arguments, **sizes)
    _scores_kernel[(batch, num_tiles)](
        scores,
        log_sums,
        anchors,
        *arguments,
        VALUE_NORM=value_norm,
        KEYDIFF_POWER=float(keydiff_power),
        SEVERAL_TILES=several,
        maxnreg=None if float32 else 128,  # so that two programs of 8 warps share the registers of a multiprocessor
        **sizes,
    )
    return scores


def tile_sizes(num_candidates: int, num_rows: int, block_d: int, float32: bool) -> tuple[int, int, int]:
    """Candidates a tile, queries a tile, warps a program."""
    if float32:  # no tensor cores: small tiles, so that the operands of the plain product fit the registers
        return 32, 32, 4
    block_q = min(64, max(16, triton.next_power_of_2(num_rows)))
    resident = max(16, triton.next_power_of_2(num_candidates))
    if resident * block_d * 2 <= _TILE_BYTES:
        return resident, block_q, max(4, resident // 32)
    return 64 if block_d > 128 else 128, block_q, 4


@triton.jit
def _locate(NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """This program's place in the batch, request, layer and KV head; neighbours share the lines of a block."""
    pid = tl.program_id(0).to(tl.int64)
    return pid, pid // (NUM_LAYERS * NUM_KV_HEADS), pid // NUM_KV_HEADS % NUM_LAYERS, pid % NUM_KV_HEADS


@triton.jit
def _load_tile(ptrs, offsets, mask, layer, dims, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[BLOCK_T, BLOCK_D]: the candidates' keys or values of one head; zeros outside."""
    rows = layer_ptr(ptrs, layer, DTYPE, ALIGNMENT) + offsets[:, None] + dims[None, :]
    return tl.load(rows, mask=mask[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _load_queries(
    numbers, scales, cos, sin, partner, rows, layer_row, head, dims,
    NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_Q, BLOCK_D] without their scales, and these [BLOCK_Q].

    Row r is query r // GROUP_SIZE of the group's head r % GROUP_SIZE. layer_row: of the bank's (layer, slot) pairs.
    """
    num_queries: tl.constexpr = NUM_ROWS // GROUP_SIZE
    vectors = (layer_row * num_queries + rows // GROUP_SIZE) * NUM_HEADS + head * GROUP_SIZE + rows % GROUP_SIZE
    mask = (rows < NUM_ROWS)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(numbers + vectors[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0).to(tl.float32)
    if TURN:
        others = tl.load(partner + dims, mask=dims < HEAD_DIM, other=0)
        other = tl.load(numbers + vectors[:, None] * HEAD_DIM + others[None, :], mask=mask, other=0).to(tl.float32)
        angles = rows[:, None] * HEAD_DIM + dims[None, :]
        q = q * tl.load(cos + angles, mask=mask, other=0.0) + other * tl.load(sin + angles, mask=mask, other=0.0)
    return q, tl.load(scales + vectors, mask=rows < NUM_ROWS, other=0.0)


@triton.jit
def _inverse_norms(keys):
    """[BLOCK_T]: 1 / length of each key [BLOCK_T, BLOCK_D] in float32; of a key of zeros any number will do."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(keys * keys, axis=1)), 1e-12)


@triton.jit
def _direction(vector):
    return vector / tl.maximum(tl.sqrt(tl.sum(vector * vector, axis=0)), 1e-12)


@triton.jit
def _scores_kernel(
    scores, log_sums, anchors,
    numbers, scales, cos, sin, partner, req_slots, candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    max_num_reqs, stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, DOT_DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr,
    TURN: tl.constexpr, VALUE_NORM: tl.constexpr, KEYDIFF_POWER: tl.constexpr, SEVERAL_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid, due, layer, head = _locate(NUM_LAYERS, NUM_KV_HEADS)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    valid = tokens < NUM_CANDIDATES
    block_row = candidate_blocks + due * stride_candidates
    offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    offsets += head * stride_kv_head

    weight = tl.full([BLOCK_T], 1.0 / NUM_ROWS, tl.float32)  # the mean over queries and heads of the group
    if VALUE_NORM:
        v = _load_tile(value_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(tl.float32)
        weight *= tl.sqrt(tl.sum(v * v, axis=1))
        if HAS_SCALE:
            weight *= tl.load(v_scale + layer)
    if HAS_SCALE:
        softmax_scale *= tl.load(k_scale + layer)

    keys = _load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM)
    if KEYDIFF_POWER > 0:
        k = keys.to(tl.float32)
        inverse = _inverse_norms(k)
        if SEVERAL_TILES:
            anchor = tl.load(anchors + pid * BLOCK_D + dims)
        else:
            anchor = _direction(tl.sum(k * inverse[:, None], axis=0))
        distinct = tl.maximum(1.0 - tl.sum(k * anchor[None, :], axis=1) * inverse, 0.0)
        if KEYDIFF_POWER == 2.0:
            weight *= distinct * distinct
        else:
            weight *= tl.exp2(KEYDIFF_POWER * tl.log2(tl.maximum(distinct, 1e-38)))
    keys = tl.trans(keys.to(DOT_DTYPE))

    layer_row = layer * max_num_reqs + tl.load(req_slots + due)
    total = tl.full([BLOCK_T], 0.0, tl.float32)
    for start in range(0, NUM_ROWS, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q, scale = _load_queries(
            numbers, scales, cos, sin, partner, rows, layer_row, head, dims,
            NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, TURN,
        )  # fmt: skip
        logits = tl.dot(q.to(DOT_DTYPE), keys, input_precision="ieee") * (scale * softmax_scale)[:, None]
        logits = tl.where(valid[None, :], logits, float("-inf"))
        if SEVERAL_TILES:
            log_sum = tl.load(log_sums + pid * NUM_ROWS + rows, mask=rows < NUM_ROWS, other=0.0)
            p = tl.exp2(logits - log_sum[:, None])
            row_weight = tl.where(rows < NUM_ROWS, 1.0, 0.0)
        else:
            p = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
            row_weight = tl.where(rows < NUM_ROWS, 1.0 / tl.sum(p, axis=1), 0.0)
        total += tl.sum(p * row_weight[:, None], axis=0)
    tl.store(scores + pid * NUM_CANDIDATES + tokens, total * weight, mask=valid)


@triton.jit
def _anchors_kernel(
    anchors,
    numbers, scales, cos, sin, partner, req_slots, candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    max_num_reqs, stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, DOT_DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr,
    TURN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The direction of the mean of all candidates' normalised keys, of length 1."""
    pid, due, layer, head = _locate(NUM_LAYERS, NUM_KV_HEADS)
    dims = tl.arange(0, BLOCK_D)
    block_row = candidate_blocks + due * stride_candidates
    anchor = tl.full([BLOCK_D], 0.0, tl.float32)
    for start in range(0, NUM_CANDIDATES, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        valid = tokens < NUM_CANDIDATES
        offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
        offsets += head * stride_kv_head
        k = _load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(tl.float32)
        anchor += tl.sum(k * _inverse_norms(k)[:, None], axis=0)
    tl.store(anchors + pid * BLOCK_D + dims, _direction(anchor))


@triton.jit
def _log_sums_kernel(
    log_sums,
    numbers, scales, cos, sin, partner, req_slots, candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    max_num_reqs, stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr, NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, DOT_DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr,
    TURN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log2 of the sum over all candidates of 2^logit, for a tile of queries."""
    pid, due, layer, head = _locate(NUM_LAYERS, NUM_KV_HEADS)
    dims = tl.arange(0, BLOCK_D)
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    layer_row = layer * max_num_reqs + tl.load(req_slots + due)
    q, scale = _load_queries(
        numbers, scales, cos, sin, partner, rows, layer_row, head, dims,
        NUM_HEADS, GROUP_SIZE, NUM_ROWS, HEAD_DIM, TURN,
    )  # fmt: skip
    q = q.to(DOT_DTYPE)
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
        keys = _load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(DOT_DTYPE)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(valid[None, :], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp2(highest - new_highest) + tl.sum(tl.exp2(logits - new_highest[:, None]), axis=1)
        highest = new_highest
    tl.store(log_sums + pid * NUM_ROWS + rows, highest + tl.log2(total), mask=rows < NUM_ROWS)
