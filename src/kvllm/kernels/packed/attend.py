"""Attention over packed survivors, merged with the backend's attention over prompt and tail.

A program reads packed blocks of one request and KV head, for all query heads that share it. Codes are unpacked into the
registers that the tensor cores read: with 1 or 2 warps per program, Triton uses instructions that take both operands
from registers, so unpacked data never passes through shared memory. Logits are transposed, [tokens, queries], since a
query group is small.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.kernels.packed.layout import PackedLayout, as_words, read_block_ref
from kvllm.kernels.packed.unpack import code_bias, codes, narrowed, restored, unpair
from kvllm.kernels.paged import INTERPRETED, next_power_of_2
from kvllm.layout import IntArray, ceil_div

LEAST_BLOCKS = 8  # per program, to amortize its fixed cost
MOST_PROGRAMS = 2048  # per launch, approximately: twice as many as an H100 runs at once
_PARTS_MERGED = 4  # at once


# The dtype of the queries in products; bfloat16 represents every fp8 value exactly.
_DOT_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.bfloat16,
}


class Batch(NamedTuple):
    """Where the survivors of a step's requests are.

    query_start_loc: [num_reqs + 1] int32, index of each request's first token in the step
    survivor_blocks: [max_num_reqs, max_blocks] int32, from `kvllm.compression.paged_store`
    plan:            [5, at least num_reqs] int32, as in `kvllm.kernels.block_tables`: the packed blocks of a request
                     are those from row PROMPT up to row PREFIX, exclusive; row 3 is its row in `survivor_blocks`; row 4
                     comes from `plan_parts`
    programs:        [at least the number of parts] int32, from `order_parts`
    """

    query_start_loc: Tensor
    survivor_blocks: Tensor
    plan: Tensor
    programs: Tensor


def merge_packed_ref(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    layout: PackedLayout,
    scale: float,
    soft_cap: float = 0.0,
) -> None:
    """Merge attention over each request's packed blocks into `output`, in place; computed in float64.

    output:       [num_tokens, num_heads, head_dim], attention over prompt and tail
    lse:          [num_heads, num_tokens] float32, the log-sum-exp of its logits
    query:        [num_tokens, num_heads, head_dim]; fp8 if the cache is fp8: packed keys include the query's scale
    keys, values: one layer's tensors of a `PagedCache`
    scale:        factor of the logits
    soft_cap:     c replaces each logit by c * tanh(logit / c); 0: no cap
    """
    starts = batch.query_start_loc.tolist()
    for i, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        first, last, row = (int(batch.plan[j, i]) for j in (0, 1, 3))
        if last <= first or end <= start:
            continue
        blocks = batch.survivor_blocks[row, first:last].long()
        k, v = (
            read_block_ref(as_words(t), blocks, layout, by_channel).flatten(0, 1).double()
            for t, by_channel in ((keys, True), (values, False))
        )
        own = query[start:end].double().unflatten(1, (k.shape[1], -1))
        logits = torch.einsum("qhgd,thd->qhgt", own, k).flatten(1, 2) * scale
        if soft_cap:
            logits = (logits / soft_cap).tanh() * soft_cap
        probabilities = logits.softmax(-1).unflatten(1, (k.shape[1], -1))
        packed = torch.einsum("qhgt,thd->qhgd", probabilities, v).flatten(1, 2)
        share = (logits.logsumexp(-1) - lse[:, start:end].T.double()).sigmoid()[..., None]
        output[start:end] = (output[start:end].double() * (1 - share) + packed * share).to(output.dtype)


def max_parts(num_reqs: int, num_kv_heads: int) -> int:
    """The most parts that `plan_parts` can make for `num_reqs` requests."""
    return ceil_div(MOST_PROGRAMS, num_kv_heads) + num_reqs


def plan_parts(num_blocks: IntArray, num_kv_heads: int) -> IntArray:
    """Divide the packed blocks of requests into parts of about the same size; a program handles one part and KV head.

    num_blocks: [num_reqs]; 0 skips a request
    returns     [num_reqs]: cumulative number of parts, including the request's own
    """
    size = max(LEAST_BLOCKS, ceil_div(int(num_blocks.sum()) * num_kv_heads, MOST_PROGRAMS))
    return np.cumsum(ceil_div(num_blocks, size))


def order_parts(num_blocks: IntArray, ends: IntArray, out: npt.NDArray[np.int32]) -> None:
    """Assign parts to programs, the largest first, so that the last programs are short and end together.

    num_blocks: as in `plan_parts`
    ends:       the result of `plan_parts`
    out:        output: request + 2**16 * the part's index within the request; -1 after the last part
    """
    counts = np.diff(ends, prepend=0)
    sizes = num_blocks / np.maximum(counts, 1)
    requests = np.argsort(-sizes, kind="stable")
    requests = np.repeat(requests, counts[requests])
    first = np.flatnonzero(np.diff(requests, prepend=-1))  # of each request in the new order
    number = np.arange(len(requests)) - np.repeat(first, np.diff(first, append=len(requests)))
    out[: len(requests)] = requests + (number << 16)
    out[len(requests) :] = -1


class PackedAttention:
    """`merge_packed_ref` as Triton kernels, with buffers at fixed addresses.

    Requests with one query token need two launches: one that divides their blocks among programs, and one that merges
    the results. Requests with more (resumed ones that are recomputed) need a single other launch, which `prefill`
    enables.
    """

    def __init__(
        self, layout: PackedLayout, num_heads: int, num_kv_heads: int, max_num_reqs: int, device: Any,
        soft_cap: float = 0.0,
    ) -> None:  # fmt: skip
        self.layout, self.soft_cap = layout, soft_cap
        self.num_heads, self.num_kv_heads, self.group_size = num_heads, num_kv_heads, num_heads // num_kv_heads
        most = max_parts(max_num_reqs, num_kv_heads) * num_heads
        self.outputs = torch.empty(most, layout.head_dim, dtype=torch.float32, device=device)
        self.lse = torch.empty(most, dtype=torch.float32, device=device)

    def merge(
        self, output: Tensor, lse: Tensor, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float,
        prefill: bool = False,
    ) -> None:  # fmt: skip
        """As `merge_packed_ref`."""
        self.attend(query, keys, values, batch, scale)
        self.finish(output, lse, query, keys, values, batch, scale, prefill)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> None:
        """The part of `merge` that does not need the backend's output; its results go to the buffers."""
        block_n = max(8, next_power_of_2(self.group_size))
        # With 128 registers a multiprocessor runs eight programs at once; larger heads need more registers.
        limit = {"maxnreg": 128} if block_n == 8 and self.layout.head_dim <= 128 else {}
        num_parts = max_parts(len(batch.query_start_loc) - 1, self.num_kv_heads)
        self._launch(
            num_parts, None, None, query, keys, values, batch, scale,
            PREFILL=False, BLOCK_Q=1, BLOCK_N=block_n, num_stages=3, **limit,
        )  # fmt: skip

    def finish(
        self, output: Tensor, lse: Tensor, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float,
        prefill: bool = False,
    ) -> None:  # fmt: skip
        """The rest of `merge`, once the backend's output is there."""
        assert output.stride(2) == lse.stride(1) == 1
        num_reqs, head_dim = len(batch.query_start_loc) - 1, self.layout.head_dim
        _merge_packed_kernel[(num_reqs, self.num_heads)](
            output, lse, self.outputs, self.lse, batch.query_start_loc, batch.plan, output.stride(0), output.stride(1),
            lse.stride(0), batch.plan.stride(0), HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim),
            PARTS=_PARTS_MERGED, num_warps=1,
        )  # fmt: skip
        if prefill:
            block_n = max(32, next_power_of_2(self.group_size))
            block_q = block_n // next_power_of_2(self.group_size)
            self._launch(
                ceil_div(query.shape[0], block_q) + num_reqs, output, lse, query, keys, values, batch, scale,
                PREFILL=True, BLOCK_Q=block_q, BLOCK_N=block_n, num_stages=2,
            )  # fmt: skip

    def _launch(
        self, size: int, output: Tensor | None, lse: Tensor | None, query: Tensor, keys: Tensor, values: Tensor,
        batch: Batch, scale: float, **options: Any,
    ) -> None:  # fmt: skip
        layout = self.layout
        assert query.stride(2) == 1
        keys, values = as_words(keys), as_words(values)
        dtype = _DOT_DTYPES[query.dtype]
        plain = INTERPRETED or dtype == tl.float32
        strides = (0, 0, 0) if output is None or lse is None else (*output.stride()[:2], lse.stride(0))
        _attend_packed_kernel[(size, self.num_kv_heads)](
            output, lse, self.outputs, self.lse, query, keys, values, *batch, len(batch.query_start_loc) - 1,
            *strides, *query.stride()[:2], *keys.stride()[:3], batch.survivor_blocks.stride(0), batch.plan.stride(0),
            scale / math.log(2),
            NUM_TOKENS=layout.num_tokens,
            HEAD_DIM=layout.head_dim,
            GROUP_SIZE=self.group_size,
            TOKENS_PER_ROW=layout.tokens_per_row,
            PAIRS_PER_ROW=layout.pairs_per_row,
            CODE_ROWS=layout.code_rows,
            DTYPE=tl.float32 if plain else dtype,
            ASSEMBLY=not plain,
            SOFT_CAP=self.soft_cap * math.log2(math.e),
            BLOCK_T=max(16, next_power_of_2(layout.num_tokens)),
            BLOCK_W=max(16, next_power_of_2(layout.num_words)),
            **{"num_warps": 2, **options},
        )  # fmt: skip


@triton.jit
def _pair_offsets(indices, stride_row, PAIRS_PER_ROW: tl.constexpr):
    """Offsets from the start of the first pair row, in pairs; rows are `stride_row` words apart."""
    return indices // PAIRS_PER_ROW * (stride_row // 2) + indices % PAIRS_PER_ROW


@triton.jit
def _request_of(tile, query_start_loc, num_reqs, BLOCK_Q: tl.constexpr):
    """The request of a tile of queries; request i starts with tile query_start_loc[i] // BLOCK_Q + i."""
    low, high = 0, num_reqs
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _parts_of(req, part_ends):
    """The index of a request's first part, and how many parts it has."""
    start = 0
    if req > 0:
        start = tl.load(part_ends + req - 1)
    return start, tl.load(part_ends + req) - start


@triton.jit
def _load_queries(query, there, words, quarter: tl.constexpr, NUM_WORDS: tl.constexpr, DTYPE: tl.constexpr):
    mask = there[None, :] & (words < NUM_WORDS)[:, None]
    loaded = tl.load(query[None, :] + quarter * NUM_WORDS + words[:, None], mask=mask).to(DTYPE)
    return tl.where(mask, loaded, 0.0)


# A single compiled variant, which is loaded before serving and so before CUDA graphs are captured.
@triton.jit(do_not_specialize=["num_reqs", "stride_lse_head"])
def _attend_packed_kernel(
    output, lse, part_outputs, part_lse, query, keys, values, query_start_loc, survivor_blocks, plan,
    programs, num_reqs,
    stride_out_token, stride_out_head, stride_lse_head, stride_query_token, stride_query_head,
    stride_block, stride_row, stride_head, stride_survivors, stride_plan, scale,
    NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_SIZE: tl.constexpr, TOKENS_PER_ROW: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr, CODE_ROWS: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
    SOFT_CAP: tl.constexpr, PREFILL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Column n of the logits belongs to query token n // GROUP of the tile, and head n % GROUP of the query group."""
    NUM_WORDS: tl.constexpr = HEAD_DIM // 4
    GROUP: tl.constexpr = BLOCK_N // BLOCK_Q
    head = tl.program_id(1)
    if PREFILL:
        tile = tl.program_id(0)
        req = _request_of(tile, query_start_loc, num_reqs, BLOCK_Q)
        start = tl.load(query_start_loc + req)
        token = start + (tile - (start // BLOCK_Q + req)) * BLOCK_Q
        end = tl.load(query_start_loc + req + 1)
        part = 0
    else:
        # Computed on the host: a search here would be many dependent loads.
        program = tl.load(programs + tl.program_id(0))
        if program < 0:
            return
        req, number = program & 0xFFFF, program >> 16
        token = tl.load(query_start_loc + req)
        end = token + 1
    first_block = tl.load(plan + req)
    num_blocks = tl.load(plan + stride_plan + req) - first_block
    first, last = 0, num_blocks
    if PREFILL:
        if (token >= end) | (end - start == 1):
            return
    else:
        parts_start, num_parts = _parts_of(req, plan + 4 * stride_plan)
        part = parts_start + number
        size = tl.cdiv(num_blocks, num_parts)
        first = number * size
        last = tl.minimum(first + size, num_blocks)
    if first >= last:
        return
    row = tl.load(plan + 3 * stride_plan + req).to(tl.int64)
    blocks = survivor_blocks + row * stride_survivors + first_block
    n = tl.arange(0, BLOCK_N)
    own_token, own_head = token + n // GROUP, head * GROUP_SIZE + n % GROUP
    own = (own_token < end) & (n % GROUP < GROUP_SIZE)
    words, tokens = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_T)
    queries = query + own_token.to(tl.int64) * stride_query_token + own_head * stride_query_head
    q0 = _load_queries(queries, own, words, 0, NUM_WORDS, DTYPE)
    q1 = _load_queries(queries, own, words, 1, NUM_WORDS, DTYPE)
    q2 = _load_queries(queries, own, words, 2, NUM_WORDS, DTYPE)
    q3 = _load_queries(queries, own, words, 3, NUM_WORDS, DTYPE)
    there, inside = tokens < NUM_TOKENS, words < NUM_WORDS
    mask_keys, mask_values = there[:, None], there[None, :]
    if NUM_WORDS < BLOCK_W:
        mask_keys, mask_values = mask_keys & inside[None, :], mask_values & inside[:, None]
    code_offsets = tokens // TOKENS_PER_ROW * stride_row + tokens % TOKENS_PER_ROW * NUM_WORDS
    key_offsets = code_offsets[:, None] + words[None, :]
    value_offsets = code_offsets[None, :] + words[:, None]  # loaded transposed, which saves moving data in registers
    pairs_start = CODE_ROWS * stride_row
    pairs_0 = _pair_offsets(words, stride_row, PAIRS_PER_ROW)
    pairs_1 = _pair_offsets(words + NUM_WORDS, stride_row, PAIRS_PER_ROW)
    pairs_2 = _pair_offsets(words + 2 * NUM_WORDS, stride_row, PAIRS_PER_ROW)
    pairs_3 = _pair_offsets(words + 3 * NUM_WORDS, stride_row, PAIRS_PER_ROW)
    token_pairs = _pair_offsets(tokens, stride_row, PAIRS_PER_ROW)
    bias = code_bias(DTYPE, ASSEMBLY)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    # Summed over a block's tokens only at the end: in the loop each token of a block has its own sum.
    total = tl.full([BLOCK_T, BLOCK_N], 0.0, tl.float32)
    rest = tl.full([BLOCK_T, BLOCK_N], 0.0, tl.float32)
    o0 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o1 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o2 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o3 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    for i in tl.range(first, last):
        base = tl.load(blocks + i).to(tl.int64) * stride_block + head * stride_head
        key_words = tl.load(keys + base + key_offsets, mask=mask_keys, other=0)
        value_words = tl.load(values + base + value_offsets, mask=mask_values, other=0)
        key_pairs = (keys + base + pairs_start).to(tl.pointer_type(tl.int32))
        s0, z0 = unpair(tl.load(key_pairs + pairs_0, mask=inside, other=0), DTYPE, ASSEMBLY)
        s1, z1 = unpair(tl.load(key_pairs + pairs_1, mask=inside, other=0), DTYPE, ASSEMBLY)
        s2, z2 = unpair(tl.load(key_pairs + pairs_2, mask=inside, other=0), DTYPE, ASSEMBLY)
        s3, z3 = unpair(tl.load(key_pairs + pairs_3, mask=inside, other=0), DTYPE, ASSEMBLY)
        value_pairs = (values + base + pairs_start).to(tl.pointer_type(tl.int32))
        t, y = unpair(tl.load(value_pairs + token_pairs, mask=there, other=0), tl.float32, ASSEMBLY)
        k = restored(key_words, s0[None, :], z0[None, :], 0, DTYPE, ASSEMBLY)
        logits = tl.dot(k, q0, input_precision="ieee")
        k = restored(key_words, s1[None, :], z1[None, :], 1, DTYPE, ASSEMBLY)
        logits = tl.dot(k, q1, acc=logits, input_precision="ieee")
        k = restored(key_words, s2[None, :], z2[None, :], 2, DTYPE, ASSEMBLY)
        logits = tl.dot(k, q2, acc=logits, input_precision="ieee")
        k = restored(key_words, s3[None, :], z3[None, :], 3, DTYPE, ASSEMBLY)
        logits = tl.dot(k, q3, acc=logits, input_precision="ieee") * scale
        if SOFT_CAP > 0:
            # c * tanh(x / c), for base-2 logits
            logits = SOFT_CAP - 2.0 * SOFT_CAP / (1.0 + tl.exp2(logits * (2.0 * 1.4426950408889634 / SOFT_CAP)))
        logits = tl.where(there[:, None], logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=0))
        p = tl.exp2(logits - new_highest[None, :])
        shrink = tl.exp2(highest - new_highest)[None, :]
        highest = new_highest
        weighted = narrowed(p * t[:, None], DTYPE, ASSEMBLY)
        total = total * shrink + p
        rest = rest * shrink + (p * y[:, None] - bias * weighted.to(tl.float32))
        o0 = tl.dot(codes(value_words, 0, DTYPE, ASSEMBLY), weighted, acc=o0 * shrink, input_precision="ieee")
        o1 = tl.dot(codes(value_words, 1, DTYPE, ASSEMBLY), weighted, acc=o1 * shrink, input_precision="ieee")
        o2 = tl.dot(codes(value_words, 2, DTYPE, ASSEMBLY), weighted, acc=o2 * shrink, input_precision="ieee")
        o3 = tl.dot(codes(value_words, 3, DTYPE, ASSEMBLY), weighted, acc=o3 * shrink, input_precision="ieee")
    sums = tl.sum(total, axis=0)
    own_rest = (tl.sum(rest, axis=0) / sums)[None, :]
    shrink = (1.0 / sums)[None, :]
    o0, o1, o2, o3 = o0 * shrink + own_rest, o1 * shrink + own_rest, o2 * shrink + own_rest, o3 * shrink + own_rest
    own_lse = highest + tl.log2(sums)
    mask = inside[:, None] & own[None, :]
    if PREFILL:
        others = tl.load(lse + own_head * stride_lse_head + own_token, mask=own, other=0.0) * 1.4426950408889634
        share = (1.0 / (1.0 + tl.exp2(others - own_lse)))[None, :]
        target = (output + own_token.to(tl.int64) * stride_out_token + own_head * stride_out_head)[None, :] + words[
            :, None
        ]
        _blend(target, o0, share, mask)
        _blend(target + NUM_WORDS, o1, share, mask)
        _blend(target + 2 * NUM_WORDS, o2, share, mask)
        _blend(target + 3 * NUM_WORDS, o3, share, mask)
    else:
        own_part = part * (tl.num_programs(1) * GROUP_SIZE) + own_head
        tl.store(part_lse + own_part, own_lse, mask=own)
        target = (part_outputs + own_part.to(tl.int64) * HEAD_DIM)[None, :] + words[:, None]
        tl.store(target, o0, mask=mask)
        tl.store(target + NUM_WORDS, o1, mask=mask)
        tl.store(target + 2 * NUM_WORDS, o2, mask=mask)
        tl.store(target + 3 * NUM_WORDS, o3, mask=mask)


@triton.jit
def _blend(target, packed, share, mask):
    plain = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (plain * (1.0 - share) + packed * share).to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_lse_head"])
def _merge_packed_kernel(
    output, lse, part_outputs, part_lse, query_start_loc, plan,
    stride_out_token, stride_out_head, stride_lse_head, stride_plan, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One program per request and head."""
    req, head = tl.program_id(0), tl.program_id(1)
    parts_start, num_parts = _parts_of(req, plan + 4 * stride_plan)
    if num_parts == 0:
        return
    token = tl.load(query_start_loc + req)
    dims = tl.arange(0, BLOCK_D)
    mask = dims < HEAD_DIM
    target = output + token.to(tl.int64) * stride_out_token + head * stride_out_head + dims
    merged = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    highest = tl.load(lse + head * stride_lse_head + token) * 1.4426950408889634
    total = 1.0
    num_blocks = tl.load(plan + stride_plan + req) - tl.load(plan + req)
    # Because of rounding up, a request's last parts may be empty.
    num_parts = tl.cdiv(num_blocks, tl.cdiv(num_blocks, num_parts))
    for first in range(0, num_parts, PARTS):  # several at once, so that their loads overlap
        parts = first + tl.arange(0, PARTS)
        there = parts < num_parts
        parts = (parts_start + parts).to(tl.int64) * tl.num_programs(1) + head
        own_lse = tl.load(part_lse + parts, mask=there, other=float("-inf"))
        own = tl.load(
            part_outputs + parts[:, None] * HEAD_DIM + dims[None, :], mask=there[:, None] & mask[None, :], other=0.0
        )
        new_highest = tl.maximum(highest, tl.max(own_lse, axis=0))
        shrink, weights = tl.exp2(highest - new_highest), tl.exp2(own_lse - new_highest)
        merged = merged * shrink + tl.sum(own * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        highest = new_highest
    tl.store(target, (merged / total).to(output.dtype.element_ty), mask=mask)
