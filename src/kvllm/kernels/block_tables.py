"""Physical block tables and sequence lengths for attention: the prefix segment, then the tail segment."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def join_segments_ref(
    block_table: Tensor, seq_lens: Tensor, seq_lens_out: Tensor, survivor_blocks: Tensor, plan: Tensor, block_size: int,
    packed: bool = False,
) -> None:  # fmt: skip
    """Remove the blocks between the two segments, and put the survivors' blocks after the prompt's; in place.

    block_table:     [num_reqs, max_blocks] int32, block ids by logical index; afterwards by physical index. Entries
                     past a request's physical length do not change
    seq_lens:        [num_reqs] int32, logical lengths, including this step's tokens
    seq_lens_out:    [num_reqs] int32, output: physical lengths; may be `seq_lens` itself
    survivor_blocks: [max_num_reqs, max_blocks] int32, by physical index, from `kvllm.compression.paged_store`
    plan:            [4, at least num_reqs] int32: blocks of the prompt, blocks of the prefix segment, the logical block
                     at which the tail segment starts (`kvllm.compression.rows`; 0: the request does not change), and
                     the request's row in `survivor_blocks`
    packed:          omit the survivors, which another kernel reads (`kvllm.kernels.packed`)
    """
    arrays: Any = (block_table, seq_lens, seq_lens_out, survivor_blocks, plan)
    if block_table.is_cpu:  # in NumPy, which takes a sixth of the time for so few numbers: the CPU engine runs this
        arrays = tuple(each.numpy() for each in arrays)
    table, lengths, lengths_out, survivors, segments = arrays
    for i in range(len(lengths)):
        prompt, prefix, tail, row = segments[:, i].tolist()
        length = int(lengths[i])
        prefix = prompt if packed else prefix
        if tail:
            length -= (tail - prefix) * block_size
            num_blocks = -(-length // block_size)
            raw = table[i, tail : tail + num_blocks - prefix] + 0  # a copy, since the ranges may overlap
            table[i, prefix:num_blocks] = raw
            table[i, prompt:prefix] = survivors[row, prompt:prefix]
        lengths_out[i] = length


def join_segments(
    block_table: Tensor, seq_lens: Tensor, seq_lens_out: Tensor, survivor_blocks: Tensor, plan: Tensor, block_size: int,
    packed: bool = False,
) -> None:  # fmt: skip
    """`join_segments_ref` as a Triton kernel, one program per request."""
    assert block_table.stride(1) == survivor_blocks.stride(1) == plan.stride(1) == 1
    if len(seq_lens):
        _join_kernel[(len(seq_lens),)](
            block_table,
            seq_lens,
            seq_lens_out,
            survivor_blocks,
            plan,
            block_table.stride(0),
            survivor_blocks.stride(0),
            plan.stride(0),
            BLOCK_SIZE=block_size,
            TILE=512,
            PACKED=packed,
            num_warps=4,
        )


@triton.jit
def _join_kernel(
    block_table, seq_lens, seq_lens_out, survivor_blocks, plan, stride_table, stride_survivors, stride_plan,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    req = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens + req)
    tail = tl.load(plan + 2 * stride_plan + req)
    if tail > 0:
        prompt = tl.load(plan + req)
        prefix = prompt
        if not PACKED:
            prefix = tl.load(plan + stride_plan + req)
        length -= (tail - prefix) * BLOCK_SIZE
        num_blocks = tl.cdiv(length, BLOCK_SIZE)
        table = block_table + req * stride_table
        survivors = survivor_blocks + tl.load(plan + 3 * stride_plan + req).to(tl.int64) * stride_survivors
        start = prompt
        while start < num_blocks:
            physical = start + tl.arange(0, TILE)
            valid = physical < num_blocks
            raw = tl.load(table + physical + tail - prefix, mask=valid & (physical >= prefix), other=0)
            kept = tl.load(survivors + physical, mask=valid & (physical < prefix), other=0)
            # A tile reads at or after the entries that it writes, so no tile reads what an earlier one wrote. Working
            # in place needs this barrier only, between the reads and the writes of one tile.
            tl.debug_barrier()
            tl.store(table + physical, tl.where(physical < prefix, kept, raw), mask=valid)
            start += TILE
    tl.store(seq_lens_out + req, length)
