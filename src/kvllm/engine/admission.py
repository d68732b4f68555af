"""How many free blocks admission leaves to the requests that run.

Compressed requests hold less after an event and more before the next. Requests that started together have their
events together, and admitting others into the trough would preempt them at the crest: each preemption computes a whole
answer again. So a request is admitted only into what the running ones leave free over the next interval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvllm.layout import IntArray

NUM_TIMES = 16  # at which `most_ahead` looks


def most_ahead(held: Callable[[IntArray], IntArray], to_end: IntArray, lookahead: int) -> int:
    """Most blocks that requests will hold beyond today's, at any time in the next `lookahead` steps.

    held:   the blocks that each holds after so many steps, [any, num_reqs] of both
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
    """Most blocks that requests will hold beyond today's, at any time in the next `interval` steps.

    held:         [num_reqs], blocks held now of the groups that are compressed
    to_event:     [num_reqs], steps to the next event; to_end: steps until the request must end
    freed:        [num_reqs], blocks that an event frees
    local_blocks: blocks of all other groups that the requests hold after so many steps, [any, num_reqs] of both
    num_groups:   groups that are compressed: each takes a block where one is full
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
