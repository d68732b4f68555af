from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvllm.config import KvConfig
from kvllm.methods import make_method
from kvllm.methods.kara import Kara, token2chunk
from tests.methods.windows import random_window


def scores_by_loops(window, bidirectional, value_norm):
    """The definition, one query, one head and one key at a time, in Python floats."""
    batch, num_tokens, num_kv_heads, head_dim = window.keys.shape
    num_queries, num_heads = window.queries.shape[1:3]
    group_size = num_heads // num_kv_heads
    result = torch.zeros(batch, num_kv_heads, num_tokens, dtype=torch.float64)
    for b in range(batch):
        for head in range(num_heads):
            kv_head = head // group_size
            for q in range(num_queries):
                place = int(window.query_positions[q])
                seen = [t for t in range(num_tokens) if bidirectional or t <= place]
                query = window.queries[b, q, head].double()
                weights = {
                    t: math.exp(float(query @ window.keys[b, t, kv_head].double()) / head_dim**0.5) for t in seen
                }
                for t in seen:
                    judges = num_queries if bidirectional else sum(int(p) >= t for p in window.query_positions)
                    norm = float(window.values[b, t, kv_head].double().norm()) if value_norm else 1.0
                    share = weights[t] / sum(weights.values()) / judges / group_size
                    result[b, kv_head, t] += share * norm
    return result


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize("num_kv_heads, group_size", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_scores_equal_the_definition(bidirectional, value_norm, num_kv_heads, group_size):
    window = random_window(num_kv_heads=num_kv_heads, group_size=group_size)
    actual = Kara(bidirectional=bidirectional, value_norm=value_norm).score(window)
    expected = scores_by_loops(window, bidirectional, value_norm)
    # Sums of a few dozen terms in float32 against the same in float64.
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_key_is_judged_by_the_queries_before_it_only_when_bidirectional():
    """All queries lie before the last key and point at it."""
    window = random_window(batch=1, num_tokens=8, num_queries=2, num_kv_heads=1, group_size=1)
    window.query_positions.copy_(torch.tensor([3, 5]))
    window.keys[0, 7] = 10 * window.queries[0, 0]
    assert Kara(value_norm=False).score(window)[0, 0].argmax() == 7
    causal = Kara(value_norm=False, bidirectional=False).score(window)[0, 0]
    assert (causal[6:] == 0).all() and (causal[:6] > 0).all()


def test_a_query_before_the_window_sees_nothing_in_the_causal_ablation():
    window = random_window()
    window.query_positions.copy_(torch.tensor([-3, -2, -1, -1, 4]))
    scores = Kara(bidirectional=False).score(window)
    assert (scores[..., :5] > 0).all() and (scores[..., 5:] == 0).all()


def token2chunk_by_loops(scores, num_kept, max_chunk_size, chunk_fill):
    """The three steps of the docstring on one row of Python floats; returns picks, fillers (their picks), kept."""
    tokens = range(len(scores))
    picks = sorted(sorted(tokens, key=lambda t: (-scores[t], t))[:num_kept])
    fillers = {}
    for first, last in zip(picks, picks[1:], strict=False):
        if last - first + 1 <= max_chunk_size:
            fillers.update({t: (first, last) for t in range(first + 1, last)})
    # In float32, as the tensors have it.
    share = torch.tensor(chunk_fill, dtype=torch.float32)
    worth = {t: (scores[t], 1) for t in picks}
    worth |= {t: (float(share * torch.tensor(min(scores[a], scores[b]))), 0) for t, (a, b) in fillers.items()}
    kept = sorted(sorted(worth, key=lambda t: (-worth[t][0], -worth[t][1], t))[:num_kept])
    return picks, fillers, kept


# Few distinct values, so that ties are the rule; and any float at all, subnormal ones included.
some_scores = st.one_of(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=40),
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(some_scores, st.data())
def test_token2chunk(scores, data):
    num_kept = data.draw(st.integers(1, len(scores)))
    max_chunk_size = data.draw(st.integers(1, 9))
    chunk_fill = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9990234375]))
    picks, fillers, expected = token2chunk_by_loops(scores, num_kept, max_chunk_size, chunk_fill)
    kept = token2chunk(torch.tensor([[scores]]), num_kept, max_chunk_size, chunk_fill)[0, 0].tolist()

    assert kept == expected
    assert len(set(kept)) == num_kept and kept == sorted(kept)
    for t in set(kept) - set(picks):
        first, last = fillers[t]  # between two picks that span a chunk of at most gamma ...
        assert first < t < last and last - first + 1 <= max_chunk_size
        assert first in kept and last in kept  # ... and never without them


@settings(max_examples=100, deadline=None)
@given(some_scores, st.data())
def test_a_chunk_size_of_one_is_the_plain_top_k(scores, data):
    num_kept = data.draw(st.integers(1, len(scores)))
    kept = token2chunk(torch.tensor([[scores]]), num_kept, 1, 0.5)[0, 0].tolist()
    assert kept == sorted(sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:num_kept])


def test_the_weakest_isolated_pick_makes_room():
    #         0    1    2    3    4    5    6    7
    scores = [9.0, 0.0, 8.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert token2chunk(torch.tensor([[scores]]), 3, 3, 0.5)[0, 0].tolist() == [0, 1, 2]
    assert token2chunk(torch.tensor([[scores]]), 3, 2, 0.5)[0, 0].tolist() == [0, 2, 7]  # the gap is too wide
    assert token2chunk(torch.tensor([[scores]]), 3, 3, 0.1)[0, 0].tolist() == [0, 2, 7]  # the filler too cheap
    assert token2chunk(torch.tensor([[scores]]), 3, 3, 0.125)[0, 0].tolist() == [0, 2, 7]  # a tie: the pick stays


def test_equal_scores_keep_the_first():
    assert token2chunk(torch.ones(2, 3, 64), 16, 8, 0.5).tolist() == [[list(range(16))] * 3] * 2


def test_token2chunk_rows_are_independent():
    scores = torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(0))
    batched = token2chunk(scores, 12, 8, 0.5)
    for b in range(3):
        for h in range(4):
            row = token2chunk(scores[b : b + 1, h : h + 1], 12, 8, 0.5)
            assert torch.equal(batched[b, h], row[0, 0])


def test_options():
    assert make_method(KvConfig(max_chunk_size=5)) == Kara(max_chunk_size=5)
    assert make_method(KvConfig(method_options={"chunk_fill": 0.25})) == Kara(chunk_fill=0.25)
    with pytest.raises(ValueError, match=r"chunk_fill=1.0: a share in \[0, 1\)"):
        KvConfig(method_options={"chunk_fill": 1.0})
    with pytest.raises(ValueError, match="max_chunk_size=0: must be positive"):
        KvConfig(method_options={"max_chunk_size": 0})
