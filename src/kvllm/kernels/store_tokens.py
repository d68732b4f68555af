"""Stores a step's tokens of one layer: keys and values in the KV cache, queries in the query bank."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from kvllm.compression.query_bank import LEVELS, SMALLEST, QueryBank
from kvllm.kernels.paged import PagedCache, next_power_of_2
from kvllm.kernels.rounding import rounded, rounded_to_bfloat16
from kvllm.layout import ceil_div

_HEADS = 8  # per program


class NewPairs(NamedTuple):
    """A step's keys and values of one layer, and their slots in the cache.

    key, value:   [num_tokens, num_kv_heads, head_dim]
    slot_mapping: [at most num_tokens] int64, block id * block_size + index in the block; -1: not stored
    """

    key: Tensor
    value: Tensor
    cache: PagedCache
    slot_mapping: Tensor


def store_tokens_ref(
    query: Tensor, bank: QueryBank, layer: int, codes: Tensor, pairs: NewPairs | None = None, overlap: bool = False
) -> None:
    """`QueryBank.store`, and for `pairs` vLLM's `reshape_and_cache_flash` without quantisation.

    query: [num_tokens, num_heads, head_dim], padded like the layer's input
    codes: [at least num_tokens] int32, from `QueryBank.codes`; -1: not stored
    overlap: changes nothing here
    """
    bank.store(layer, query, codes[: len(query)])
    if pairs is None:
        return
    key, value, cache, slot_mapping = pairs
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    for tokens, target in ((key, cache.keys[layer]), (value, cache.values[layer])):
        target[slots // cache.block_size, slots % cache.block_size] = tokens[: len(stored)][stored].to(cache.dtype)


def store_tokens(
    query: Tensor, bank: QueryBank, layer: int, codes: Tensor, pairs: NewPairs | None = None, overlap: bool = False
) -> None:
    """`store_tokens_ref` as a Triton kernel, one program per token and per few heads of its query, key or value.

    overlap: whether the next kernel may start early, as `kvllm.kernels.overlap` says

    Safe inside CUDA graphs: it allocates nothing, and its grid depends only on the padded number of tokens.
    """
    num_tokens, num_heads, head_dim = query.shape
    assert query.stride(2) == 1 and query.stride(1) == head_dim
    assert bank.queries.is_contiguous() and bank.scales.is_contiguous()
    assert (num_heads, head_dim) == (bank.num_heads, bank.head_dim)
    if not num_tokens:
        return
    block_h = min(_HEADS, next_power_of_2(num_heads))
    programs = num_query_programs = ceil_div(num_heads, block_h)
    key = value = slot_mapping = keys = values = None
    strides, num_slots, num_kv_heads, block_size = (0, 0, 0, 0, 0), 0, 0, 1
    if pairs is not None:
        key, value, cache, slot_mapping = pairs
        assert cache.k_scale is None
        assert key.stride()[1:] == value.stride()[1:] == (head_dim, 1)
        keys, values, strides = cache.keys[layer], cache.values[layer], (key.stride(0), value.stride(0), *cache.strides)
        num_slots, num_kv_heads, block_size = len(slot_mapping), cache.num_kv_heads, cache.block_size
        programs += 2 * ceil_div(num_kv_heads, block_h)
    _store_tokens_kernel[(num_tokens, programs)](
        query,
        bank.queries[layer],
        bank.scales[layer],
        codes,
        query.stride(0),
        key,
        value,
        keys,
        values,
        slot_mapping,
        num_slots,
        *strides,
        NUM_QUERIES=bank.num_queries,
        NUM_HEADS=num_heads,
        GROUP_SIZE=bank.group_size,
        HEAD_DIM=head_dim,
        STRIDE=bank.query_stride,
        LEVELS=LEVELS,
        SMALLEST=SMALLEST,
        EXACT=bank.queries.dtype == torch.float32,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        NUM_QUERY_PROGRAMS=num_query_programs,
        BLOCK_H=block_h,
        BLOCK_D=next_power_of_2(head_dim),
        BLOCK_P=next_power_of_2(head_dim // 2),
        OVERLAP=overlap,
        num_warps=2,
    )


# num_slots changes from step to step, and must not trigger recompilation when it is a multiple of 16.
@triton.jit(do_not_specialize=["num_slots"])
def _store_tokens_kernel(
    query, numbers, scales, codes, stride_query,
    key, value, keys, values, slot_mapping, num_slots,
    stride_key, stride_value, stride_block, stride_slot, stride_head,
    NUM_QUERIES: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    STRIDE: tl.constexpr, LEVELS: tl.constexpr, SMALLEST: tl.constexpr, EXACT: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_QUERY_PROGRAMS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    if NUM_KV_HEADS > 0:
        if program >= NUM_QUERY_PROGRAMS:
            rest = program - NUM_QUERY_PROGRAMS
            num_programs: tl.constexpr = (NUM_KV_HEADS + BLOCK_H - 1) // BLOCK_H
            slot = tl.load(slot_mapping + token, mask=token < num_slots, other=-1)
            if rest < num_programs:
                _store_heads(
                    key + token * stride_key, keys, slot, rest, stride_block, stride_slot, stride_head,
                    NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_H, BLOCK_D,
                )  # fmt: skip
            else:
                _store_heads(
                    value + token * stride_value, values, slot, rest - num_programs,
                    stride_block, stride_slot, stride_head,
                    NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_H, BLOCK_D,
                )  # fmt: skip
            return
    heads = program * BLOCK_H + tl.arange(0, BLOCK_H)
    half: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, BLOCK_P)
    inside = (heads < NUM_HEADS)[:, None] & (pairs < half)[None, :]
    # Loaded before the code says which heads are stored, so that the loads overlap.
    source = query + token * stride_query + heads[:, None] * HEAD_DIM + pairs[None, :]
    low, high = tl.load(source, mask=inside, other=0.0), tl.load(source + half, mask=inside, other=0.0)
    code = tl.load(codes + token)
    if code < 0:
        return
    period: tl.constexpr = NUM_QUERIES * STRIDE
    row, offset = (code // period).to(tl.int64), code % period
    at = (offset + heads % GROUP_SIZE * STRIDE // GROUP_SIZE) % period
    stored = (at % STRIDE == STRIDE - 1) & (heads < NUM_HEADS)
    low, high = low.to(tl.float32), high.to(tl.float32)
    target = (row * NUM_QUERIES + at // STRIDE) * NUM_HEADS + heads
    mask = stored[:, None] & inside
    scale = tl.full([BLOCK_H], 1.0, tl.float32)
    if EXACT:
        tl.store(numbers + target[:, None] * HEAD_DIM + pairs[None, :], low, mask=mask)
        tl.store(numbers + target[:, None] * HEAD_DIM + half + pairs[None, :], high, mask=mask)
    else:
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1)
        scale = rounded_to_bfloat16(tl.maximum(largest, SMALLEST) * (1.0 / LEVELS))
        steps = tl.broadcast_to(scale[:, None], low.shape)
        packed = rounded(tl.div_rn(low, steps)) + 16.0 * rounded(tl.div_rn(high, steps))
        tl.store(numbers + target[:, None] * half + pairs[None, :], packed.to(tl.int8), mask=mask)
    tl.store(scales + target, scale.to(tl.bfloat16), mask=stored)


@triton.jit
def _store_heads(
    row, cache, slot, program, stride_block, stride_slot, stride_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store some heads of one token's key or value in its slot."""
    heads = program * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    inside = (heads < NUM_KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    # Loaded before the slot is known, for the same reason as the queries.
    x = tl.load(row + heads[:, None] * HEAD_DIM + dims[None, :], mask=inside)
    if slot >= 0:
        target = cache + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
        tl.store(target + heads[:, None] * stride_head + dims[None, :], x.to(cache.dtype.element_ty), mask=inside)
