"""The ring's arithmetic against a simulated ring, written token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvllm.compression.query_ring import entry_of, oldest_entry, query_positions, query_shifts
from kvllm.config import KvConfig
from kvllm.layout import Geometry


@st.composite
def configs(draw):
    """A config with blocks of 8, of either policy, whose query span fits the first event."""
    stride = draw(st.sampled_from([1, 2, 4, 8]))
    buffer_size = stride * draw(st.integers(1, 12))
    if draw(st.booleans()):
        return KvConfig(
            policy="budget",
            window_size=8 * draw(st.integers(1, 3)),
            buffer_size=buffer_size,
            query_stride=stride,
            budget_size=8 * draw(st.integers(2, 6)),
            budget_interval=8 * draw(st.integers(1, 4)),
        )
    window_size = 8 * draw(st.integers(2, 8))
    return KvConfig(
        window_size=window_size,
        buffer_size=buffer_size,
        query_stride=stride,
        retention_ratio=0.5,
        history_size=draw(st.sampled_from([0, window_size, 2 * window_size])),
    )


@settings(max_examples=100, deadline=None)
@given(configs(), st.integers(1, 40), st.integers(1, 9))
def test_query_positions_equal_simulated_rings(config, num_prompt_tokens, group_size):
    """A ring for each head of a group: where the queries of one stand, and by how much the others' are older."""
    geometry = Geometry.from_config(config, block_size=8)
    assert geometry is not None
    protected_len = -(-num_prompt_tokens // 8) * 8
    num_queries = config.num_queries
    shifts = query_shifts(config.query_stride, group_size)
    # The position in the text of each entry's query, for each head of the query group.
    rings = [[-1] * num_queries for _ in range(group_size)]
    cache: list[int] = []  # the position in the text of each token in the cache
    event = 0
    for position in range(protected_len + 300):
        if geometry.num_events(num_prompt_tokens, position) > event:
            first = geometry.candidate_start(num_prompt_tokens, event)
            # Tokens that were candidates before (budget policy) may be gone, their queries are not: they count on
            # backwards as if nothing were.
            length, raw = len(cache) - first, geometry.interval + geometry.buffer_size
            oldest = oldest_entry(config, geometry, event)
            in_order = [ring[oldest:] + ring[:oldest] for ring in rings]
            ring = in_order[0]
            assert ring == sorted(ring)
            fresh = [p for p in ring if event == 0 or position - p <= raw]
            expected = [cache.index(p) - first if p in fresh else length - (position - p) for p in ring]
            actual = query_positions(config, geometry, event)
            assert actual.dtype == np.int64 and actual.tolist() == expected
            assert max(ring) == position - 1 and position - min(map(min, rings)) <= config.query_span
            for other, shift in zip(in_order, shifts, strict=True):
                assert [p - shift for p in ring] == other
            # Any survivors will do: here the first ones. What follows the candidates moves up.
            shape = geometry.shape(event)
            num_candidates, num_kept = shape.num_candidates, shape.num_kept
            del cache[first + num_kept : first + num_candidates]
            event += 1
        cache.append(position)
        offset = position - protected_len
        for ring, shift in zip(rings, shifts, strict=True):
            stored, entry = entry_of(offset, int(shift), config.query_stride, num_queries)
            if offset >= 0 and stored:
                ring[entry] = position
    assert event > 0


def test_one_example_by_hand():
    """W=16, U=8, stride 4: an event finds 24 tokens, every fourth with its query, and the ring moved on."""
    config = KvConfig(window_size=16, buffer_size=8, query_stride=4, retention_ratio=0.5)
    geometry = Geometry.from_config(config, 8)
    assert geometry is not None
    for event, oldest in enumerate([0, 4, 2, 0, 4]):
        assert query_positions(config, geometry, event).tolist() == [3, 7, 11, 15, 19, 23]
        assert oldest_entry(config, geometry, event) == oldest


@pytest.mark.parametrize(
    "query_stride, group_size, shifts",
    [(1, 3, [0, 0, 0]), (4, 1, [0]), (4, 2, [0, 2]), (4, 3, [0, 1, 2]), (4, 4, [0, 1, 2, 3]), (8, 3, [0, 2, 5])]
    + [(4, 8, [0, 0, 1, 1, 2, 2, 3, 3]), (2, 5, [0, 0, 0, 1, 1])],
)
def test_shifts_by_hand(query_stride, group_size, shifts):
    assert query_shifts(query_stride, group_size).tolist() == shifts


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16))
def test_tokens_are_shared_evenly_among_the_heads(query_stride, group_size):
    """Every head keeps one token of each stride, and no token is kept by two more heads than another."""
    shifts = query_shifts(query_stride, group_size)
    tokens = np.arange(5 * query_stride, 6 * query_stride)
    stored = entry_of(tokens, shifts[:, None], query_stride, 1)[0]
    assert (stored.sum(axis=1) == 1).all()
    counts = stored.sum(axis=0)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    "offset, shift, expected",
    [(0, 0, None), (3, 0, 0), (19, 0, 0), (0, 3, 0), (3, 3, None), (4, 3, 1), (13, 2, 3), (17, 2, 0)],
)
def test_what_is_stored_where(offset, shift, expected):
    """Numbers, arrays and tensors; counted modulo the period of 16 tokens too."""
    for counted in (offset, offset % 16, np.array(offset), torch.tensor(offset)):
        stored, entry = entry_of(counted, shift, 4, 4)
        assert (int(entry) if stored else None) == expected
