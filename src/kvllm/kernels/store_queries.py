"""Write the queries of this step's tokens to one layer of the query bank."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def store_queries_ref(query: Tensor, bank_layer: Tensor, bank_slots: Tensor) -> None:
    """bank_layer[req, slot] = query[token], for every token that has a slot.

    query:      [num_tokens, num_heads, head_dim], after RoPE; rows may be strided
    bank_layer: [max_num_reqs, num_queries, num_heads, head_dim], written, in its own dtype
    bank_slots: [>= num_tokens] int32, req * num_queries + slot, or -1: not stored; no slot twice
    """
    slots = bank_slots[: len(query)]
    stored = (slots >= 0).nonzero().squeeze(1)
    bank_layer.view(-1, *query.shape[1:])[slots[stored].long()] = query.to(bank_layer.dtype)[stored]


def store_queries(query: Tensor, bank_layer: Tensor, bank_slots: Tensor) -> None:
    """`store_queries_ref` as a Triton kernel, one program per token.

    Safe inside CUDA graphs: it allocates nothing, and its grid depends on the padded number of tokens only.
    """
    num_tokens, num_heads, head_dim = query.shape
    assert query.stride(2) == 1 and query.stride(1) == head_dim and bank_layer.is_contiguous()
    row_size = num_heads * head_dim
    if num_tokens:
        _store_queries_kernel[(num_tokens,)](
            query,
            bank_layer,
            bank_slots,
            query.stride(0),
            ROW_SIZE=row_size,
            BLOCK=min(4096, triton.next_power_of_2(row_size)),
            num_warps=4,
        )


@triton.jit
def _store_queries_kernel(query, bank_layer, bank_slots, stride_query, ROW_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(bank_slots + token).to(tl.int64)
    if slot < 0:
        return
    for start in range(0, ROW_SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        row = tl.load(query + token * stride_query + columns, mask=columns < ROW_SIZE)
        row = row.to(bank_layer.dtype.element_ty)
        tl.store(bank_layer + slot * ROW_SIZE + columns, row, mask=columns < ROW_SIZE)
