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

# Between the points in time that `most_ahead` looks at, requests may hold more blocks than it sees: with 16 points a
# scheduler that is short of memory preempts three times as often.
NUM_TIMES = 64


def most_ahead(
    held: Callable[[IntArray], IntArray], to_end: IntArray, lookahead: int, num_times: int = NUM_TIMES
) -> int:
    """The most blocks that requests will hold beyond the current ones, at any time in the next `lookahead` steps.

    held:      maps steps from now to the blocks that each request holds then, both [any, num_reqs]
    to_end:    [num_reqs], steps until the request must end
    num_times: points in time that are looked at
    """
    steps = np.linspace(0, lookahead, num_times + 1, dtype=np.int64)[:, None]
    blocks = np.where(to_end < steps, 0, held(np.minimum(steps, to_end))).sum(axis=1)
    return max(0, int(blocks.max() - blocks[0]))


class Headroom:
    """Keeps the result of `most_ahead` for a few steps, since it takes a part of a millisecond.

    While the same compressed requests decode, each holds at most one block more or less than foreseen, and the blocks
    in use say how much of the foreseen growth has happened.
    """

    def __init__(self, num_steps: int) -> None:
        """num_steps: how many steps a result is good for, that in which it was worked out included"""
        self.num_steps = num_steps
        self._key: list[object] = []
        self._most_used = self._steps_left = 0

    def keep(self, key: list[object], most_used: int) -> None:
        """Keep a result that was just worked out.

        key:       what it depends on: equal while the same requests run
        most_used: the most blocks of the pool that will be in use
        """
        self._key, self._most_used, self._steps_left = key, most_used, self.num_steps

    def next_step(self) -> None:
        """Age what is kept; call it in every step, also in those that do not ask."""
        self._steps_left = max(0, self._steps_left - 1)

    def now(self, key: list[object], used: int) -> int | None:
        """Blocks beyond the `used` ones that the running requests will need; None: work it out again."""
        if key != self._key:
            self._steps_left = 0
        return max(0, self._most_used - used) if self._steps_left else None
