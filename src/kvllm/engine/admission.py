"""How many free blocks admission reserves for the running requests.

A compressed request holds the fewest blocks right after an event and the most right before the next one, and requests
that started together have their events together. If their free blocks went to new requests after an event, the pool
would run out before the next one, and each preemption recomputes a whole answer. So admission leaves free what the
running requests will need over the next interval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvllm.layout import IntArray

NUM_TIMES = 16  # points in time that `most_ahead` samples


def most_ahead(held: Callable[[IntArray], IntArray], to_end: IntArray, lookahead: int) -> int:
    """The most blocks that requests will hold beyond the current ones, at any time in the next `lookahead` steps.

    held:   maps steps from now to the blocks that each request holds then, both [any, num_reqs]
    to_end: [num_reqs], steps until the request must end
    """
    steps = np.linspace(0, lookahead, NUM_TIMES + 1, dtype=np.int64)[:, None]
    blocks = np.where(to_end < steps, 0, held(np.minimum(steps, to_end))).sum(axis=1)
    return max(0, int(blocks.max() - blocks[0]))


def blocks_ahead(
    held: IntArray,
    to_event: IntArray,
    to_end: IntArray,
    freed: IntArray,
    interval: int,
    block_size: int,
    local_blocks: Callable[[IntArray], IntArray] | None = None,
    num_groups: int = 1,
) -> int:
    """The most blocks that requests will hold beyond the current ones, at any time in the next `interval` steps.

    held:         [num_reqs], blocks held now in the compressed groups
    to_event:     [num_reqs], steps to the next event
    to_end:       [num_reqs], steps until the request must end
    freed:        [num_reqs], blocks that the next event frees
    local_blocks: maps steps from now to the blocks that each request holds then in all other groups, both
                  [any, num_reqs]
    num_groups:   compressed groups, each of which allocates a block when its last one is full
    """
    steps = np.arange(block_size, interval + 1, block_size)[:, None]  # [num_times, 1]
    lasting = np.minimum(steps, to_end)
    grown = num_groups * (lasting // block_size)
    if local_blocks is not None:
        local_now = local_blocks(np.zeros_like(to_end))
        held, grown = held + local_now, grown + local_blocks(lasting) - local_now
    happened = freed * (to_event < steps)
    gone = np.where(to_end < steps, held + grown - happened, 0)
    return max(0, int((grown - happened - gone).sum(axis=1).max(initial=0)))
