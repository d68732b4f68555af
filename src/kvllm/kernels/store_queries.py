"""Write the queries of this step's tokens to one layer of the query bank."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.query_bank import LEVELS, SMALLEST, QueryBank

_HEADS = 8  # a program's


def store_queries_ref(query: Tensor, bank: QueryBank, layer: int, codes: Tensor) -> None:
    """`QueryBank.store`; `codes` may be longer than the tokens."""
    bank.store(layer, query, codes[: len(query)])


def store_queries(query: Tensor, bank: QueryBank, layer: int, codes: Tensor) -> None:
    """`store_queries_ref` as a Triton kernel, a program for each token and some heads. `codes` is int32.

    Safe inside CUDA graphs: it allocates nothing, and its grid depends on the padded number of tokens only.
    """
    num_tokens, num_heads, head_dim = query.shape
    assert query.stride(2) == 1 and query.stride(1) == head_dim
    assert bank.queries.is_contiguous() and bank.scales.is_contiguous()
    block_h = min(_HEADS, triton.next_power_of_2(num_heads))
    if num_tokens:
        _store_queries_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
            query,
            bank.queries[layer],
            bank.scales[layer],
            codes,
            query.stride(0),
            NUM_QUERIES=bank.num_queries,
            NUM_HEADS=num_heads,
            GROUP_SIZE=bank.group_size,
            HEAD_DIM=head_dim,
            STRIDE=bank.query_stride,
            LEVELS=LEVELS,
            SMALLEST=SMALLEST,
            EXACT=bank.queries.dtype == torch.float32,
            BLOCK_H=block_h,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=2,
        )


@triton.jit
def _store_queries_kernel(
    query, numbers, scales, codes, stride_query,
    NUM_QUERIES: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    STRIDE: tl.constexpr, LEVELS: tl.constexpr, SMALLEST: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    inside = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    # Read before it is known which of these are stored, so that the two loads do not wait for each other.
    x = tl.load(query + token * stride_query + heads[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
    code = tl.load(codes + token)
    if code < 0:
        return
    period: tl.constexpr = NUM_QUERIES * STRIDE
    row, place = (code // period).to(tl.int64), code % period
    at = (place + heads % GROUP_SIZE * STRIDE // GROUP_SIZE) % period
    stored = (at % STRIDE == STRIDE - 1) & (heads < NUM_HEADS)
    x = x.to(tl.float32)
    scale = tl.full([BLOCK_H], 1.0, tl.float32)
    if not EXACT:
        scale = tl.maximum(tl.max(tl.abs(x), axis=1), SMALLEST) * (1.0 / LEVELS)
        # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, halves to even, as PyTorch does.
        x = (tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)) + 12582912.0) - 12582912.0
    target = (row * NUM_QUERIES + at // STRIDE) * NUM_HEADS + heads
    x = x.to(numbers.dtype.element_ty)
    tl.store(numbers + target[:, None] * HEAD_DIM + dims[None, :], x, mask=stored[:, None] & inside)
    tl.store(scales + target, scale, mask=stored)
