"""The headroom of admission equals a walk through the steps to come."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvllm.config import KvConfig
from kvllm.engine.admission import NUM_TIMES, Headroom, most_ahead
from kvllm.layout import Geometry

REQUEST = st.tuples(st.integers(1, 40), st.integers(0, 300), st.integers(1, 100))  # prompt, generated, steps to its end
GEOMETRY = Geometry.from_config(KvConfig(window_size=32, buffer_size=16, retention_ratio=0.5), 4)


@given(st.lists(REQUEST, min_size=1, max_size=6))
def test_equals_a_walk(requests: list[tuple[int, int, int]]) -> None:
    """Over an interval with as many steps as points in time, so that none is left out."""
    assert GEOMETRY is not None
    prompt, generated, to_end = np.array(requests, np.int64).T
    totals = []
    for time in range(NUM_TIMES + 1):
        running = [(p, p + g + time) for p, g, end in requests if end >= time]
        totals.append(sum(GEOMETRY.blocks_held(p, computed) for p, computed in running))

    def held(steps: Any) -> Any:
        return GEOMETRY.blocks_held(prompt, prompt + generated + steps)

    assert most_ahead(held, to_end, NUM_TIMES) == max(totals) - totals[0]


def test_requests_in_step_need_a_whole_interval_and_spread_ones_what_lasts() -> None:
    assert GEOMETRY is not None
    interval, end, event = GEOMETRY.interval, np.full(8, 10_000), GEOMETRY.event_at(8, 5)
    same, spread = np.full(8, event), event + np.arange(0, interval, interval // 8)

    def needed(computed: Any) -> int:
        return most_ahead(lambda steps: GEOMETRY.blocks_held(8, computed + steps), end, interval)

    in_step, spread_out = needed(same), needed(spread)
    assert in_step == 8 * interval // 4
    assert in_step / 2 <= spread_out <= 0.6 * in_step  # every second token lasts


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
