"""The headroom of admission equals a walk through the steps to come."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvllm.engine.admission import Headroom, blocks_ahead
from kvllm.groups import Groups
from kvllm.layers import Local

BLOCK, INTERVAL, FREED = 4, 32, 5
REQUEST = st.tuples(st.integers(1, 40), st.integers(0, INTERVAL), st.integers(1, 100))


@given(st.lists(REQUEST, min_size=1, max_size=6))
def test_equals_a_walk(requests: list[tuple[int, int, int]]) -> None:
    held, to_event, to_end = np.array(requests, np.int64).T
    most = 0
    for time in range(BLOCK, INTERVAL + 1, BLOCK):
        now = 0
        for blocks, event, end in requests:
            if end >= time:
                now += time // BLOCK - (FREED if event < time else 0)
            else:
                now -= blocks
        most = max(most, now)
    actual = blocks_ahead(held, to_event, to_end, np.full(len(held), FREED), INTERVAL, BLOCK)
    assert actual == most


@given(st.lists(st.tuples(REQUEST, st.integers(1, 60)), min_size=1, max_size=6), st.booleans())
def test_other_groups_count_what_they_will_hold(
    requests: list[tuple[tuple[int, int, int], int]], chunked: bool
) -> None:
    """Two groups with a window of 20 tokens, or a chunk; a request that ends gives back the blocks of all groups."""
    groups = Groups(1, 1, 2, Local(20, chunked))
    (held, to_event, to_end), computed = np.array([r for r, _ in requests]).T, np.array([c for _, c in requests])
    most = 0
    for time in range(BLOCK, INTERVAL + 1, BLOCK):
        now = 0
        for (blocks, event, end), at in requests:
            before = groups.local_blocks_held(at, BLOCK)
            if end >= time:
                now += (
                    time // BLOCK - (FREED if event < time else 0) + groups.local_blocks_held(at + time, BLOCK) - before
                )
            else:
                now -= blocks + before
        most = max(most, now)
    actual = blocks_ahead(
        held, to_event, to_end, np.full(len(held), FREED), INTERVAL, BLOCK,
        lambda steps: groups.local_blocks_held(computed + steps, BLOCK),
    )  # fmt: skip
    assert actual == most


def test_requests_in_step_need_a_whole_interval_and_spread_ones_little() -> None:
    count = INTERVAL // BLOCK
    same = np.full(count, INTERVAL)
    spread = np.arange(0, INTERVAL, BLOCK)
    held, end, freed = np.full(count, 20), np.full(count, 10_000), np.full(count, FREED)
    assert blocks_ahead(held, same, end, freed, INTERVAL, BLOCK) == count * INTERVAL // BLOCK
    assert blocks_ahead(held, spread, end, freed, INTERVAL, BLOCK) <= count * (INTERVAL // BLOCK - FREED)
    assert blocks_ahead(held[:0], same[:0], end[:0], freed[:0], INTERVAL, BLOCK) == 0


def test_headroom_is_kept_for_a_few_steps_of_the_same_requests() -> None:
    headroom = Headroom(4)
    assert headroom.now(["a"], 10) is None
    headroom.keep(["a"], 25)
    for used, left in (12, 13), (30, 0):
        headroom.next_step()
        assert headroom.now(["a"], used) == left
    headroom.next_step()  # one in which nobody asks
    headroom.next_step()
    assert headroom.now(["a"], 10) is None
    headroom.keep(["a"], 25)
    assert headroom.now(["a", "b"], 10) is None
    assert headroom.now(["a"], 10) is None
