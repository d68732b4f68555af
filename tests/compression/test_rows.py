"""Due events and their columns, and where each token's query is stored; only running requests hold rows."""

from __future__ import annotations

import numpy as np
import pytest

from kvllm.compression.rows import EVENTS, PREFIX, PROMPT, REMOVED, START, TAIL, Due, RequestRows, RunningRequests
from kvllm.config import KvConfig
from kvllm.layout import Geometry

BLOCK_SIZE = 16
CONFIG = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.375, query_stride=8)
BUDGET = KvConfig(policy="budget", budget_size=64, budget_interval=32, window_size=64, buffer_size=32, query_stride=8)


def geometry_of(config: KvConfig, ratio: float | None = None) -> Geometry:
    geometry = Geometry.from_config(config, BLOCK_SIZE, ratio)
    assert geometry is not None
    return geometry


def begin(rows: RequestRows, held: dict[int, int]) -> list[Due]:
    """A step of the requests in these rows, each with so many computed tokens."""
    names = [f"request in row {row}" for row in held]
    return rows.begin_step(np.array([*held]), np.array([*held.values()]), names)


def test_compressions_are_due_where_the_geometry_says() -> None:
    """By hand: prompts of 20 and 100 have 32 and 112 tokens in their blocks, so events at 128, 192, ... and 208."""
    rows, geometry = RequestRows(CONFIG, 4), geometry_of(CONFIG)
    rows.set(3, geometry, 20, None)
    rows.set(1, geometry, 100, None)
    rows.set(0, None, 20, None)
    assert begin(rows, {1: 127, 3: 127, 0: 500}) == []
    assert begin(rows, {1: 128, 3: 128, 0: 501}) == [Due(1, 3, geometry, 20, 0)]
    # 1.5 blocks of 4 stay: 2 of the first window. Prompt 2, prefix 2 + 2, and the tail starts at block 2 + 4.
    assert rows.columns[[PROMPT, PREFIX, TAIL, EVENTS, REMOVED], 3].tolist() == [2, 4, 6, 1, 32]
    assert rows.columns[[PROMPT, PREFIX, TAIL, EVENTS, REMOVED], 1].tolist() == [0, 0, 0, 0, 0]
    assert begin(rows, {1: 207, 3: 191}) == []
    assert begin(rows, {3: 192, 1: 208}) == [Due(0, 3, geometry, 20, 1), Due(1, 1, geometry, 100, 0)]
    # 3 blocks of two windows.
    assert rows.columns[[PROMPT, PREFIX, TAIL, EVENTS, REMOVED], 3].tolist() == [2, 5, 10, 2, 80]
    assert begin(rows, {3: 193, 1: 209, 0: 10_000}) == []


def test_budget_and_a_prompt_that_is_cut() -> None:
    """By hand: the first event at 96 + 64 + 32 + 32 = 224 tokens leaves 32 of the prompt's 96 and 64 others."""
    config = KvConfig(**(BUDGET.to_dict() | {"prompt_budget": 32}))
    rows, geometry = RequestRows(config, 1), geometry_of(config)
    rows.set(0, geometry, 90, None)
    assert begin(rows, {0: 223}) == []
    assert begin(rows, {0: 224}) == [Due(0, 0, geometry, 90, 0)]
    assert rows.columns[[PROMPT, PREFIX, TAIL, EVENTS, REMOVED], 0].tolist() == [2, 6, 12, 1, 96]
    assert begin(rows, {0: 256}) == [Due(0, 0, geometry, 90, 1)]
    assert rows.columns[[PROMPT, PREFIX, TAIL, EVENTS, REMOVED], 0].tolist() == [2, 6, 14, 2, 128]


def test_a_restarted_request_has_no_compressions() -> None:
    rows, geometry = RequestRows(CONFIG, 1), geometry_of(CONFIG)
    rows.set(0, geometry, 20, None)
    assert len(begin(rows, {0: 128})) == 1
    rows.set(0, geometry, 20, None)
    assert rows.columns[:, 0].tolist() == [0, 0, 0, 0, 32, 0]
    assert begin(rows, {0: 0}) == [] and len(begin(rows, {0: 128})) == 1
    rows.set(0, None, 20, None)  # another takes the row, and is not compressed
    assert begin(rows, {0: 100_000}) == []


@pytest.mark.parametrize("computed, counts", [(192, r"\(0, 2\)"), (127, r"\(1, 0\)")])
def test_a_request_past_a_compression_or_back_before_one_is_refused(computed: int, counts: str) -> None:
    rows, geometry = RequestRows(CONFIG, 2), geometry_of(CONFIG)
    for row in (0, 1):
        rows.set(row, geometry, 20, None)
    if computed == 127:
        begin(rows, {1: 128})
    with pytest.raises(RuntimeError, match=rf"\{{'request in row 1': {counts}\}}.*report it"):
        begin(rows, {0: 5, 1: computed})


def test_ratios_of_a_batch_differ() -> None:
    """When an event is due does not depend on the ratio; what is left does."""
    rows, half = RequestRows(CONFIG, 2), geometry_of(CONFIG, 0.5)
    rows.set(0, half, 1, None)
    rows.set(1, geometry_of(CONFIG), 1, None)
    for computed in (112, 176):
        assert [each.row for each in begin(rows, {0: computed, 1: computed})] == [0, 1]
    assert rows.columns[PREFIX].tolist() == [1 + 4, 1 + 3]
    assert rows.columns[TAIL].tolist() == [1 + 8, 1 + 8]


@pytest.mark.parametrize(
    "computed, counts",
    [
        ({0: 40, 1: 500, 2: 7}, [1, 1, 1]),  # decoding
        ({0: 20, 1: 0, 2: 90}, [1, 300, 40]),  # 1 is longer than its ring, 2 begins in the prompt
        ({2: 0, 0: 16}, [96, 97]),
    ],
)
def test_query_codes(computed: dict[int, int], counts: list[int]) -> None:
    """Of tokens that would share an entry only the newest is stored, none of the prompt, none of request 1."""
    period, prompts = 96, {0: 10, 1: 60, 2: 100}
    rows = RequestRows(CONFIG, 3)
    for row, prompt in prompts.items():
        rows.set(row, geometry_of(CONFIG) if row != 1 else None, prompt, None)
    expected: list[int] = []
    for (row, first), count in zip(computed.items(), counts, strict=True):
        start = -(-prompts[row] // BLOCK_SIZE) * BLOCK_SIZE
        for token in range(first, first + count):
            stored = row != 1 and token >= start and token >= first + count - period
            expected.append(row * period + (token - start) % period if stored else -1)
    total = sum(counts) + 5  # padding
    found = rows.query_codes(np.array([*computed]), np.array([*computed.values()]), np.array(counts), period, total)
    assert found.tolist() == [*expected, *[-1] * 5]
    assert any(code >= 0 for code in expected)
    assert rows.columns[START, 1] > 1 << 60


def test_query_codes_go_around_the_ring() -> None:
    rows = RequestRows(CONFIG, 2)
    rows.set(1, geometry_of(CONFIG), 16, None)
    one = np.array([1])
    codes = [int(rows.query_codes(one, np.array([n]), one, 96, 1)[0]) for n in (15, 16, 111, 112, 16 + 960)]
    assert codes == [-1, 96, 96 + 95, 96, 96]


def test_codes_ahead_are_those_of_the_coming_steps() -> None:
    """One request that decodes, one that does so before its ring starts, one that is not compressed."""
    rows = RequestRows(CONFIG, 3)
    for row, geometry in enumerate((geometry_of(CONFIG), geometry_of(CONFIG), None)):
        rows.set(row, geometry, 16, None)
    own, computed = np.array([1, 0, 2]), np.array([12, 100, 40])
    ahead = rows.codes_ahead(own, computed, 20, 96)
    for step, codes in enumerate(ahead):
        assert codes.tolist() == rows.query_codes(own, computed + step, np.ones(3, np.int64), 96, 3).tolist()
    assert (ahead[:4, 0] == -1).all() and (ahead[4:, 0] >= 0).all() and (ahead[:, 2] == -1).all()


def test_next_due_is_where_the_next_compression_happens() -> None:
    rows = RequestRows(CONFIG, 2)
    geometry = geometry_of(CONFIG)
    rows.set(1, geometry, 10, None)
    both = np.array([0, 1])
    for event in range(3):
        due = geometry.event_at(10, event)
        assert rows.next_due(both)[1] == due and rows.next_due(both)[0] > 1 << 60
        assert rows.begin_step(both, np.array([0, due - 1]), ["a", "b"]) == []
        assert [each.event for each in rows.begin_step(both, np.array([0, due]), ["a", "b"])] == [event]


def test_a_row_is_free_again_once_its_request_is_released() -> None:
    running = RunningRequests(2)
    first, second = running.admit("a"), running.admit("b")
    assert {first, second} == {0, 1} and running["a"] == first
    running.release(["a", "never admitted"])
    assert "a" not in running and len(running) == 1
    assert running.admit("c") == first
    running.release(["b"])
    assert running.admit("a") == second
    assert sorted(running) == ["a", "c"]


def test_more_requests_than_rows_are_refused_by_name() -> None:
    running = RunningRequests(1)
    running.admit("a")
    with pytest.raises(RuntimeError, match=r"request b is scheduled while max_num_seqs=1 others are running: \['a'\]"):
        running.admit("b")
