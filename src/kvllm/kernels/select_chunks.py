"""Kara's selection, Token2Chunk, for all rows of scores at once."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.kernels.paged import next_power_of_2
from kvllm.methods.kara import token2chunk


def select_chunks_ref(scores: Tensor, num_kept: int, max_chunk_size: int, chunk_fill: float) -> Tensor:
    """`kvllm.methods.kara.token2chunk` on rows.

    scores:  [..., num_candidates] float32
    returns  [..., num_kept] int32, ascending
    """
    return token2chunk(scores.unsqueeze(0), num_kept, max_chunk_size, chunk_fill).squeeze(0).int()


def select_chunks(scores: Tensor, num_kept: int, max_chunk_size: int, chunk_fill: float) -> Tensor:
    """`select_chunks_ref` as a Triton kernel, one program per row. max_chunk_size=1 is plain top-k.

    NaN counts as larger than infinity, so the indices are distinct and within the window for any scores.
    """
    *rows, num_candidates = scores.shape
    assert scores.dtype == torch.float32 and scores.is_contiguous() and 0 < num_kept <= num_candidates
    kept = torch.empty(*rows, num_kept, dtype=torch.int32, device=scores.device)
    if num_rows := math.prod(rows):
        block = next_power_of_2(num_candidates)
        _select_chunks_kernel[(num_rows,)](
            scores,
            kept,
            max_chunk_size,
            chunk_fill,
            NUM_CANDIDATES=num_candidates,
            NUM_KEPT=num_kept,
            FILL=max_chunk_size > 2 and chunk_fill > 0,
            BLOCK=block,
            num_warps=min(8, max(1, block // 512)),  # within one warp, the sums need no barrier
        )
    return kept


@triton.jit
def _ordered(x):
    """float32 as int32 in the same order; -0.0 equals 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _take_best(keys, rivals, favoured, COUNT: tl.constexpr):
    """Mask of the COUNT largest keys among `rivals`; among equal keys, `favoured` ones win, then earlier ones."""
    # Finds the COUNT-th largest key bit by bit: the largest value that COUNT keys reach.
    reached = tl.sum((rivals & (keys >= 0)).to(tl.int32), axis=0)
    threshold = tl.where(reached >= COUNT, 0, -2147483648)
    for i in range(31):
        trial = threshold | (1 << (30 - i))
        reached = tl.sum((rivals & (keys >= trial)).to(tl.int32), axis=0)
        threshold = tl.where(reached >= COUNT, trial, threshold)
    above = rivals & (keys > threshold)
    equal = rivals & (keys == threshold)
    num_missing = COUNT - tl.sum(above.to(tl.int32), axis=0)
    first = (equal & favoured).to(tl.int32)
    second = (equal & (favoured == 0)).to(tl.int32)
    takes_first = (first > 0) & (tl.cumsum(first, axis=0) <= num_missing)
    takes_second = (second > 0) & (tl.cumsum(second, axis=0) <= num_missing - tl.sum(first, axis=0))
    return above | takes_first | takes_second


@triton.jit
def _select_chunks_kernel(
    scores, kept, max_chunk_size, chunk_fill,
    NUM_CANDIDATES: tl.constexpr, NUM_KEPT: tl.constexpr, FILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * NUM_CANDIDATES
    kept += row * NUM_KEPT
    tokens = tl.arange(0, BLOCK)
    valid = tokens < NUM_CANDIDATES
    own = tl.load(scores + tokens, mask=valid, other=0.0)
    taken = _take_best(_ordered(own), valid, valid, NUM_KEPT)
    if FILL:
        # The output row temporarily holds the picks, so that each gap can look up the picks at its ends.
        picks = taken
        num_before = tl.cumsum(picks.to(tl.int32), axis=0)
        tl.store(kept + num_before - 1, tokens, mask=picks)
        tl.debug_barrier()
        between = valid & (picks == 0) & (num_before > 0) & (num_before < NUM_KEPT)
        left = tl.load(kept + num_before - 1, mask=between, other=0)
        right = tl.load(kept + num_before, mask=between, other=0)
        weaker = tl.minimum(
            tl.load(scores + left, mask=between, other=0.0), tl.load(scores + right, mask=between, other=0.0)
        )
        between = between & (right - left < max_chunk_size)
        keys = _ordered(tl.where(picks, own, chunk_fill * weaker))
        taken = _take_best(keys, picks | between, picks, NUM_KEPT)
        tl.debug_barrier()  # every gap has read the picks before the final indices overwrite them
    tl.store(kept + tl.cumsum(taken.to(tl.int32), axis=0) - 1, tokens, mask=taken)
