"""Block tables and lengths as attention must see them once events have emptied blocks."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def shorten_block_tables_ref(
    block_table: Tensor,
    seq_lens: Tensor,
    seq_lens_out: Tensor,
    protected_blocks: Tensor,
    num_events: Tensor,
    kept_blocks: Tensor,
    dropped_groups: Tensor,
    fixed_groups: Tensor,
    cut_blocks: Tensor,
    candidate_blocks: int,
    interval_blocks: int,
    block_size: int,
    policy: str,
) -> None:
    """Leave out the blocks that `num_events` events have emptied: `Geometry.block_map` on the device, in place.

    block_table:      [num_reqs, max_blocks] int32, rows of logical blocks, which become physical ones; entries past
                      a request's physical length stay as they are
    seq_lens:         [num_reqs] int32, logical, the tokens of this step included
    seq_lens_out:     [num_reqs] int32, written: the physical length; may be `seq_lens` itself
    protected_blocks: [num_reqs] int32, blocks of the prompt
    num_events:       [num_reqs] int32; 0 leaves the request alone
    kept_blocks:      [num_reqs] int32, blocks that survive an event; each request has its own retention ratio
    dropped_groups:   [num_reqs] int32, `Geometry.num_dropped_groups`; 0 without a history limit
    fixed_groups:     [num_reqs] int32, groups whose space the history keeps when it is compressed; 1 or more where
                      groups were dropped, and without meaning elsewhere
    cut_blocks:       [num_reqs] int32, blocks of the prompt that event 0 emptied; without meaning before
    """
    columns = (protected_blocks, num_events, kept_blocks, dropped_groups, fixed_groups, cut_blocks)
    for i in range(len(seq_lens)):
        protected, events, kept, dropped, fixed, cut = (int(t[i]) for t in columns)
        length = int(seq_lens[i])
        if events:
            length -= (events * (candidate_blocks - kept) + dropped * kept + cut) * block_size
            front = protected - cut
            physical = torch.arange(front, -(-length // block_size), device=block_table.device) - front
            groups = events - dropped if policy == "window" else 1
            window = physical // kept + torch.where(physical // kept < fixed, 0, dropped)
            survivor = window * interval_blocks + physical % kept
            raw = physical - groups * kept + candidate_blocks + (events - 1) * interval_blocks
            logical = protected + torch.where(physical < groups * kept, survivor, raw)
            block_table[i, front + physical] = block_table[i, logical]
        seq_lens_out[i] = length


def shorten_block_tables(
    block_table: Tensor,
    seq_lens: Tensor,
    seq_lens_out: Tensor,
    protected_blocks: Tensor,
    num_events: Tensor,
    kept_blocks: Tensor,
    dropped_groups: Tensor,
    fixed_groups: Tensor,
    cut_blocks: Tensor,
    candidate_blocks: int,
    interval_blocks: int,
    block_size: int,
    policy: str,
) -> None:
    """`shorten_block_tables_ref` as a Triton kernel, one program per request."""
    assert block_table.stride(1) == 1
    if len(seq_lens):
        _shorten_kernel[(len(seq_lens),)](
            block_table,
            seq_lens,
            seq_lens_out,
            protected_blocks,
            num_events,
            kept_blocks,
            dropped_groups,
            fixed_groups,
            cut_blocks,
            block_table.stride(0),
            CANDIDATE_BLOCKS=candidate_blocks,
            INTERVAL_BLOCKS=interval_blocks,
            BLOCK_SIZE=block_size,
            WINDOW_POLICY=policy == "window",
            TILE=512,
            num_warps=4,
        )


@triton.jit
def _shorten_kernel(
    block_table, seq_lens, seq_lens_out, protected_blocks, num_events, kept_blocks, dropped_groups, fixed_groups,
    cut_blocks, stride_row,
    CANDIDATE_BLOCKS: tl.constexpr, INTERVAL_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW_POLICY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    req = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens + req)
    events = tl.load(num_events + req)
    if events > 0:
        protected, kept = tl.load(protected_blocks + req), tl.load(kept_blocks + req)
        dropped, fixed, cut = tl.load(dropped_groups + req), tl.load(fixed_groups + req), tl.load(cut_blocks + req)
        length -= (events * (CANDIDATE_BLOCKS - kept) + dropped * kept + cut) * BLOCK_SIZE
        num_blocks = tl.cdiv(length, BLOCK_SIZE) - (protected - cut)
        survivors = kept
        if WINDOW_POLICY:
            survivors = (events - dropped) * kept
        to_raw = CANDIDATE_BLOCKS + (events - 1) * INTERVAL_BLOCKS - survivors
        row = block_table + req * stride_row + protected
        start = tl.where(cut > 0, 0, kept)  # behind a whole prompt the first survivors are in place already
        while start < num_blocks:
            physical = start + tl.arange(0, TILE)
            group = physical // kept
            window = group + tl.where(group < fixed, 0, dropped)
            survivor = window * INTERVAL_BLOCKS + physical % kept
            logical = tl.where(physical < survivors, survivor, physical + to_raw)
            blocks = tl.load(row + logical, mask=physical < num_blocks)
            # The map ascends and logical >= physical, so a tile reads nothing that an earlier one wrote: in place
            # needs order only between the reads and the writes of one tile.
            tl.debug_barrier()
            tl.store(row - cut + physical, blocks, mask=physical < num_blocks)
            start += TILE
    tl.store(seq_lens_out + req, length)
