"""How compressions edit a request's list of blocks, where an allocator block may consist of several kernel blocks.

All layers of a hybrid model have one page size in vLLM, so an attention layer's block may hold hundreds of tokens,
which its kernels see as many blocks of 16. Entry i of the list covers the logical tokens [i * A, (i + 1) * A), with A
the allocator's block size. The prefix segment is in the first entries, the tail segment in those of its logical
indices, and null blocks fill the gap between them, so that the list keeps its length and vLLM's arithmetic stays
correct.
"""

from __future__ import annotations

from math import ceil
from typing import TypeVar

import numpy as np

from kvllm.layout import Geometry, IntArray, ceil_div

Block = TypeVar("Block")


def num_spares(geometry: Geometry, allocator_block_size: int) -> int:
    """Empty blocks that a request keeps for the survivors of its next events.

    0 if allocator and kernel blocks have the same size, since every event empties blocks of its own window, and 0 if
    each window empties at least as many blocks as its survivors can need. Otherwise one is enough: with
    T = tail_start // A and N = ceil(prefix_len / A), T - N falls by at most one from its maximum, since tail_start
    grows by at least as many tokens as the prefix.
    """
    size = allocator_block_size
    most_kept = ceil(geometry.kept_blocks) * geometry.block_size
    return int(size > geometry.block_size and geometry.interval // size < ceil_div(most_kept, size))


def peak_allocator_blocks(
    geometry: Geometry, num_prompt_tokens: int, num_tokens: int, allocator_block_size: int, num_late: int = 0
) -> int:
    """The most allocator blocks that a request holds while it grows to `num_tokens`.

    Exact if allocator and kernel blocks have the same size, otherwise an upper bound: both segments may end inside a
    block, and the tail may start inside one.

    num_late: events whose blocks are not yet freed when the next event is due
    """
    uncompressed = ceil_div(num_tokens, allocator_block_size)
    tokens = geometry.peak_tokens(num_prompt_tokens, num_tokens) + num_late * geometry.interval
    if allocator_block_size == geometry.block_size:
        return min(uncompressed, ceil_div(tokens, allocator_block_size))
    return min(uncompressed, ceil_div(tokens, allocator_block_size) + 2 + num_spares(geometry, allocator_block_size))


def blocks_held(
    geometry: Geometry, num_prompt_tokens: IntArray, num_computed_tokens: IntArray, allocator_block_size: int
) -> IntArray:
    """Allocator blocks that requests hold: `close_gap` in closed form. The arrays must broadcast."""
    size = allocator_block_size
    events = geometry.num_events(num_prompt_tokens, num_computed_tokens)
    prefix = ceil_div(geometry.prefix_len(num_prompt_tokens, events), size) + num_spares(geometry, size)
    gap = np.maximum(geometry.tail_start(num_prompt_tokens, events) // size - prefix, 0) * (events > 0)
    return ceil_div(num_computed_tokens, size) - gap


class BlockNames:
    """Which block each entry of a request's list holds, named by the index at which the block was allocated.

    The worker's block table never moves a block from the index at which it was allocated. The edits of `close_gap`
    follow from the geometry alone, so the worker repeats them on these names.
    """

    def __init__(self, geometry: Geometry, num_prompt_tokens: int, allocator_block_size: int) -> None:
        self.geometry = geometry
        self.num_prompt_tokens = num_prompt_tokens
        self.size = allocator_block_size
        self.names: list[int | None] = []

    def close_gap(self, event: int) -> list[int]:
        """Edit the list for event number `event`; returns the kernel-block columns of the table for its survivors."""
        geometry, prompt = self.geometry, self.num_prompt_tokens
        prefix, tail = geometry.prefix_len(prompt, event + 1), geometry.tail_start(prompt, event + 1)
        self.names += range(len(self.names), max(ceil_div(prefix, self.size), tail // self.size))
        close_gap(self.names, None, geometry, prompt, event, self.size)
        first = geometry.prompt_len(prompt, event + 1) + geometry.num_left_alone(event)
        per_block = self.size // geometry.block_size
        found = []
        for row in range(first // geometry.block_size, prefix // geometry.block_size):
            name = self.names[row // per_block]
            assert name is not None
            found.append(name * per_block + row % per_block)
        return found


def close_gap(
    blocks: list[Block], null: Block, geometry: Geometry, num_prompt_tokens: int, event: int, allocator_block_size: int
) -> list[Block]:
    """Edit a request's list of blocks for event number `event`; returns the blocks to be freed, in text order.

    The blocks of the event's survivors move to the end of the prefix, in order; if allocator and kernel blocks have the
    same size, these are the first blocks of the candidates. The other blocks that no longer hold a token are replaced
    by `null` and returned, except for `num_spares`, which follow the prefix.
    """
    size, done = allocator_block_size, event + 1
    first = ceil_div(geometry.prompt_len(num_prompt_tokens, done) + geometry.num_left_alone(event), size)
    prefix_end = ceil_div(geometry.prefix_len(num_prompt_tokens, done), size)
    tail = geometry.tail_start(num_prompt_tokens, done) // size
    in_order = [*range(first, tail)]
    if event == 0:  # the blocks of a cut prompt come last: the survivors are written to the window's own blocks
        candidates = max(first, min(tail, geometry.tail_start(num_prompt_tokens, 0) // size))
        in_order = [*range(candidates, tail), *range(first, candidates)]
    emptied = [blocks[i] for i in in_order if blocks[i] is not null]
    spares = num_spares(geometry, size)
    for i in in_order:
        blocks[i] = null
    num_kept = max(0, min(prefix_end, tail) - first) + spares
    for i, block in enumerate(emptied[:num_kept]):
        blocks[first + i] = block
    return emptied[num_kept:]
