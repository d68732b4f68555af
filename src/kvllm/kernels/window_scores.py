"""Bidirectional scores of the candidates of every request due in a step, for all layers in one launch or two."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.kernels.paged import INTERPRETED, PagedCache, layer_ptr, token_offsets
from kvllm.kernels.windows import gather_window_ref

# A key tile of this size fits twice into the shared memory of a multiprocessor of a Hopper or Ampere GPU, beside the
# queries: two programs share one, so that one computes while the other loads.
_TILE_BYTES = 64 * 1024


def window_scores_ref(
    query_bank: Tensor, req_slots: Tensor, candidate_blocks: Tensor, cache: PagedCache, value_norm: bool = True
) -> Tensor:
    """How much the queries of a request look at each of its candidates, weighted by the value's norm; in float64.

    query_bank:       [num_layers, max_num_reqs, num_queries, num_heads, head_dim], after RoPE
    req_slots:        [num_due], each due request's row in the bank
    candidate_blocks: [num_due, num_candidates / block_size], block ids
    returns           [num_due, num_layers, num_kv_heads, num_candidates] in float32
    """
    queries = query_bank[:, req_slots.long()].transpose(0, 1).flatten(0, 1).double()
    keys, values = gather_window_ref(candidate_blocks, cache, torch.float64)
    grouped = queries.unflatten(2, (cache.num_kv_heads, -1))  # [batch, num_queries, num_kv_heads, group, head_dim]
    logits = torch.einsum("bqhgd,bthd->bhgqt", grouped, keys) * cache.head_dim**-0.5
    scores = logits.softmax(dim=-1).mean(dim=(2, 3))  # over the heads of a group and the queries
    if value_norm:
        scores = scores * values.norm(dim=-1).transpose(1, 2)
    return scores.float().unflatten(0, (len(req_slots), cache.num_layers))


def window_scores(
    query_bank: Tensor, req_slots: Tensor, candidate_blocks: Tensor, cache: PagedCache, value_norm: bool = True
) -> Tensor:
    """`window_scores_ref` as a Triton kernel, one program per request, layer, KV head and tile of candidates.

    Where the candidates fit one tile, their keys are read once and stay on chip. Where they do not, a first launch
    finds the softmax' denominator of every query.
    """
    num_layers, _, num_queries, num_heads, head_dim = query_bank.shape
    num_due, num_candidates = len(req_slots), candidate_blocks.shape[1] * cache.block_size
    assert query_bank.stride(4) == 1 and candidate_blocks.stride(1) == 1 and head_dim == cache.head_dim
    assert num_layers == cache.num_layers and len(candidate_blocks) == num_due
    batch, group_size = num_due * num_layers * cache.num_kv_heads, num_heads // cache.num_kv_heads
    scores = torch.empty(
        num_due, num_layers, cache.num_kv_heads, num_candidates, dtype=torch.float32, device=query_bank.device
    )
    if not batch:
        return scores

    float32 = torch.float32 in (query_bank.dtype, cache.dtype)
    dot_dtype = tl.bfloat16 if query_bank.dtype == torch.bfloat16 else tl.float16
    if float32 or INTERPRETED:  # the interpreter's dot takes the bits of bf16 for integers
        dot_dtype = tl.float32
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_t, block_q, num_warps = tile_sizes(num_candidates, num_queries * group_size, block_d, float32)
    num_tiles = triton.cdiv(num_candidates, block_t)
    arguments = (
        *(query_bank, req_slots, candidate_blocks),
        *(cache.key_ptrs, cache.value_ptrs, cache.k_scale, cache.v_scale),
        *query_bank.stride()[:4],
        candidate_blocks.stride(0),
        *cache.strides,
        head_dim**-0.5 / math.log(2),  # exp2 is cheaper than exp
    )
    sizes = dict(
        NUM_LAYERS=num_layers,
        NUM_KV_HEADS=cache.num_kv_heads,
        GROUP_SIZE=group_size,
        NUM_ROWS=num_queries * group_size,
        NUM_CANDIDATES=num_candidates,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=cache.block_size,
        KV_DTYPE=cache.tl_dtype,
        ALIGNMENT=cache.alignment,
        DOT_DTYPE=dot_dtype,
        HAS_SCALE=cache.k_scale is not None,
        BLOCK_T=block_t,
        BLOCK_Q=block_q,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=2,
    )
    log_sums = None
    if num_tiles > 1:
        log_sums = torch.empty(batch, num_queries * group_size, dtype=torch.float32, device=query_bank.device)
        num_query_tiles = triton.cdiv(num_queries * group_size, block_q)
        _log_sums_kernel[(batch, num_query_tiles)](log_sums, *arguments, **sizes)
    _scores_kernel[(batch, num_tiles)](
        scores,
        log_sums,
        *arguments,
        VALUE_NORM=value_norm,
        HAS_LOG_SUMS=log_sums is not None,
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
    bank, rows, head, dims, stride_query, stride_head,
    GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_Q, BLOCK_D]: row r is query r // GROUP_SIZE of the group's head r % GROUP_SIZE."""
    heads = head * GROUP_SIZE + rows % GROUP_SIZE
    offsets = (rows // GROUP_SIZE) * stride_query + heads * stride_head
    mask = (rows < NUM_ROWS)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(bank + offsets[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _scores_kernel(
    scores, log_sums,
    query_bank, req_slots, candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_layer, stride_req, stride_query, stride_head, stride_candidates,
    stride_kv_block, stride_kv_token, stride_kv_head, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr, DOT_DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, VALUE_NORM: tl.constexpr,
    HAS_LOG_SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid, due, layer, head = _locate(NUM_LAYERS, NUM_KV_HEADS)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    valid = tokens < NUM_CANDIDATES
    block_row = candidate_blocks + due * stride_candidates
    offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    offsets += head * stride_kv_head
    keys = tl.trans(_load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(DOT_DTYPE))

    weight = tl.full([BLOCK_T], 1.0 / NUM_ROWS, tl.float32)  # the mean over queries and heads of the group
    if VALUE_NORM:
        v = _load_tile(value_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(tl.float32)
        weight *= tl.sqrt(tl.sum(v * v, axis=1))
        if HAS_SCALE:
            weight *= tl.load(v_scale + layer)
    if HAS_SCALE:
        softmax_scale *= tl.load(k_scale + layer)

    bank = query_bank + layer * stride_layer + tl.load(req_slots + due).to(tl.int64) * stride_req
    total = tl.full([BLOCK_T], 0.0, tl.float32)
    for start in range(0, NUM_ROWS, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q = _load_queries(bank, rows, head, dims, stride_query, stride_head, GROUP_SIZE, NUM_ROWS, HEAD_DIM)
        logits = tl.dot(q.to(DOT_DTYPE), keys, input_precision="ieee") * softmax_scale
        logits = tl.where(valid[None, :], logits, float("-inf"))
        if HAS_LOG_SUMS:
            log_sum = tl.load(log_sums + pid * NUM_ROWS + rows, mask=rows < NUM_ROWS, other=0.0)
            p = tl.exp2(logits - log_sum[:, None])
            row_weight = tl.where(rows < NUM_ROWS, 1.0, 0.0)
        else:
            p = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
            row_weight = tl.where(rows < NUM_ROWS, 1.0 / tl.sum(p, axis=1), 0.0)
        total += tl.sum(p * row_weight[:, None], axis=0)
    tl.store(scores + pid * NUM_CANDIDATES + tokens, total * weight, mask=valid)


@triton.jit
def _log_sums_kernel(
    log_sums,
    query_bank, req_slots, candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_layer, stride_req, stride_query, stride_head, stride_candidates,
    stride_kv_block, stride_kv_token, stride_kv_head, softmax_scale,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr, DOT_DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log2 of the sum over all candidates of 2^logit, for a tile of queries."""
    pid, due, layer, head = _locate(NUM_LAYERS, NUM_KV_HEADS)
    dims = tl.arange(0, BLOCK_D)
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    bank = query_bank + layer * stride_layer + tl.load(req_slots + due).to(tl.int64) * stride_req
    q = _load_queries(bank, rows, head, dims, stride_query, stride_head, GROUP_SIZE, NUM_ROWS, HEAD_DIM)
    q = q.to(DOT_DTYPE)
    if HAS_SCALE:
        softmax_scale *= tl.load(k_scale + layer)

    block_row = candidate_blocks + due * stride_candidates
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    for start in range(0, NUM_CANDIDATES, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        valid = tokens < NUM_CANDIDATES
        offsets = token_offsets(block_row, tokens, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
        offsets += head * stride_kv_head
        keys = _load_tile(key_ptrs, offsets, valid, layer, dims, KV_DTYPE, ALIGNMENT, HEAD_DIM).to(DOT_DTYPE)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * softmax_scale
        logits = tl.where(valid[None, :], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp2(highest - new_highest) + tl.sum(tl.exp2(logits - new_highest[:, None]), axis=1)
        highest = new_highest
    tl.store(log_sums + pid * NUM_ROWS + rows, highest + tl.log2(total), mask=rows < NUM_ROWS)
