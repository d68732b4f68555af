"""Block tables and lengths as attention must see them: the prefix segment, then the tail segment."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def join_segments_ref(
    block_table: Tensor, seq_lens: Tensor, seq_lens_out: Tensor, survivor_blocks: Tensor, plan: Tensor, block_size: int,
    packed: bool = False,
) -> None:  # fmt: skip
    """Leave out the blocks between the segments, and put the survivors' blocks behind the prompt's; in place.

    block_table:     [num_reqs, max_blocks] int32, rows of logical blocks, which become physical ones; entries past
                     a request's physical length stay as they are
    seq_lens:        [num_reqs] int32, logical, the tokens of this step included
    seq_lens_out:    [num_reqs] int32, written: the physical length; may be `seq_lens` itself
    survivor_blocks: [max_num_reqs, max_blocks] int32, by physical index, of `kvllm.compression.paged_store`
    plan:            [4, at least num_reqs] int32: blocks of the prompt, blocks of the prefix segment, the logical block
                     at which the tail segment starts (`kvllm.compression.rows`; 0 leaves the request alone), and the
                     request's row of `survivor_blocks`
    packed:          survivors are read by a kernel of their own (`kvllm.kernels.packed`), and left out here
    """
    for i in range(len(seq_lens)):
        prompt, prefix, tail, row = plan[:, i].tolist()
        length = int(seq_lens[i])
        prefix = prompt if packed else prefix
        if tail:
            length -= (tail - prefix) * block_size
            num_blocks = -(-length // block_size)
            block_table[i, prefix:num_blocks] = block_table[i, tail : tail + num_blocks - prefix].clone()
            block_table[i, prompt:prefix] = survivor_blocks[row, prompt:prefix]
        seq_lens_out[i] = length


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
            # A tile reads behind what it writes, so no tile reads what an earlier one wrote: in place needs order only
            # between the reads and the writes of one tile.
            tl.debug_barrier()
            tl.store(table + physical, tl.where(physical < prefix, kept, raw), mask=valid)
            start += TILE
    tl.store(seq_lens_out + req, length)
