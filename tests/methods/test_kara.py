from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvllm.config import KvConfig
from kvllm.methods import make_method
from kvllm.methods.kara import Kara, rank, token2chunk
from kvllm.methods.keydiff import KeyDiff
from kvllm.methods.rkv import redundancy
from tests.methods.windows import random_window


def scores_by_loops(window, bidirectional, value_norm, moment="mean"):
    """The definition, one query, one head and one key at a time, in Python floats."""
    batch, num_tokens, num_kv_heads, head_dim = window.keys.shape
    num_queries, num_heads = window.queries.shape[1:3]
    group_size = num_heads // num_kv_heads
    result = torch.zeros(batch, num_kv_heads, num_tokens, dtype=torch.float64)
    highest = torch.zeros(batch, num_heads, num_tokens, dtype=torch.float64)
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
                    weight = weights[t] / sum(weights.values())
                    power = 2 if moment == "rms" else 1
                    result[b, kv_head, t] += weight**power / judges / group_size
                    highest[b, head, t] = max(float(highest[b, head, t]), weight)
    if moment == "rms":
        result = result.sqrt()
    if moment == "max":
        result = highest.unflatten(1, (num_kv_heads, group_size)).mean(dim=2)
    return result * window.values.double().norm(dim=-1).transpose(1, 2) if value_norm else result


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize("moment", ["mean", "rms", "max"])
@pytest.mark.parametrize("num_kv_heads, group_size", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_scores_equal_the_definition(bidirectional, value_norm, moment, num_kv_heads, group_size):
    window = random_window(num_kv_heads=num_kv_heads, group_size=group_size)
    actual = Kara(bidirectional=bidirectional, value_norm=value_norm, moment=moment).score(window)
    expected = scores_by_loops(window, bidirectional, value_norm, moment)
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


def rank_by_loops(row):
    order = sorted(range(len(row)), key=lambda t: (-row[t], t))
    return [1 - order.index(t) / (len(row) - 1) for t in range(len(row))]


def test_the_rank_is_the_place_in_the_row():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 2.0, -1.0]], [[0.0, 0.0, 0.0, 0.0, 5.0]]])
    expected = [[rank_by_loops(row.tolist()) for row in rows] for rows in scores]
    torch.testing.assert_close(rank(scores), torch.tensor(expected))
    assert rank(scores)[0, 0].tolist() == pytest.approx([1.0, 0.25, 0.75, 0.5, 0.0])
    assert rank(torch.ones(1, 1, 1)).tolist() == [[[1.0]]]


@pytest.mark.parametrize("keydiff_weight, redundancy_weight", [(0.5, 0.0), (0.0, 0.3), (2.0, 1.0)])
def test_ranks_of_other_scores_are_added(keydiff_weight, redundancy_weight):
    window = random_window()
    kara = Kara(moment="rms", keydiff_weight=keydiff_weight, redundancy_weight=redundancy_weight)
    alone = Kara(moment="rms").score(window)
    repeats = torch.stack([redundancy(keys, 0.5) for keys in window.keys])
    expected = rank(alone) + keydiff_weight * rank(KeyDiff().score(window)) + redundancy_weight * rank(-repeats)
    torch.testing.assert_close(kara.score(window), expected)
    assert (kara.score(window) >= 0).all()  # what Token2Chunk asks for


def test_the_paper_form_is_plain_and_keeps_its_chunks():
    window = random_window()
    paper = Kara(variant="paper", moment="max", keydiff_weight=1.0, key_ridge=1.0, max_chunk_size=5)
    assert paper == Kara(variant="paper", max_chunk_size=5) and paper.fused
    torch.testing.assert_close(paper.score(window), scores_by_loops(window, True, False).float(), rtol=1e-5, atol=1e-6)


def test_fused_is_what_the_kernels_compute():
    assert Kara().fused and Kara(value_norm=False, max_chunk_size=1).fused
    for options in ({"bidirectional": False}, {"moment": "rms"}, {"keydiff_weight": 0.5}, {"redundancy_weight": 0.5}):
        assert not Kara(**options).fused
    assert not Kara(key_ridge=1.0).fused and not Kara(value_ridge=1.0).fused


def test_refitting_changes_no_choice():
    window = random_window(dtype=torch.bfloat16)
    plain = Kara().compress(window, 6)
    assert plain.keys is None and plain.values is None
    rows = plain.indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 8)
    keys, values = window.keys.gather(1, rows), window.values.gather(1, rows)
    for kara, same_keys, same_values in (
        (Kara(key_ridge=1.0), False, True),
        (Kara(value_ridge=1.0), True, False),
        (Kara(key_ridge=1.0, value_ridge=1.0), False, False),
    ):
        kept = kara.compress(window, 6)
        assert torch.equal(kept.indices, plain.indices)
        assert kept.keys is not None and kept.values is not None and kept.keys.dtype == torch.bfloat16
        assert torch.equal(kept.keys, keys) == same_keys and torch.equal(kept.values, values) == same_values


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
    with pytest.raises(ValueError, match="moment='median': must be one of mean, rms, max"):
        KvConfig(method_options={"moment": "median"})
    with pytest.raises(ValueError, match="variant='papre': must be one of tuned, paper"):
        KvConfig(method_options={"variant": "papre"})
    with pytest.raises(ValueError, match="keydiff_weight=-1: must be a number from 0"):
        KvConfig(method_options={"keydiff_weight": -1})
    with pytest.raises(ValueError, match="max_chunk_size=0: must be positive"):
        KvConfig(method_options={"max_chunk_size": 0})
