from __future__ import annotations

import cmath
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvllm.config import KvConfig
from kvllm.methods import make_method
from kvllm.methods.kara import MOST_REFITTED, Kara, ahead_distances, token2chunk
from kvllm.methods.rope import Rope, frequencies
from tests.methods.loops import position_of
from tests.methods.windows import random_window


def rotated_by_hand(vector, distance, rope):
    """RoPE over this many tokens, one complex number for each pair of dimensions."""
    result = [float(x) for x in vector]
    for i, frequency in enumerate(rope.frequencies.tolist()):
        first, second = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + len(rope.frequencies))
        pair = complex(result[first], result[second]) * cmath.exp(1j * distance * frequency)
        result[first], result[second] = pair.real, pair.imag
    return torch.tensor(result, dtype=torch.float64)


def queries_by_loops(window, lookahead):
    """[batch, num_queries, num_heads, head_dim] in float64: the i-th oldest query stands i golden ratios ahead."""
    result = window.queries.double()
    if not lookahead or window.rope is None:
        return result
    batch, num_queries, num_heads, _ = result.shape
    positions = window.query_positions.tolist()
    for q in range(num_queries):
        share = sorted(positions).index(positions[q]) * (math.sqrt(5) - 1) / 2 % 1
        target = max(positions) + 1 + math.floor(share * lookahead)
        for head in range(num_heads):
            shifts = [0] * num_heads if window.query_shifts is None else window.query_shifts.tolist()
            stands = positions[q] - shifts[head % (num_heads // window.num_kv_heads)]
            for b in range(batch):
                result[b, q, head] = rotated_by_hand(result[b, q, head], target - stands, window.rope)
    return result


def distinctness_by_loops(window):
    """[batch, num_kv_heads, num_tokens] in float64: 1 - cosine of each key to the mean of all keys of length 1."""
    batch, num_tokens, num_kv_heads, _ = window.keys.shape
    result = torch.zeros(batch, num_kv_heads, num_tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_kv_heads):
            unit = [key / key.norm() for key in window.keys[b, :, h].double()]
            mean = sum(unit) / num_tokens
            for t in range(num_tokens):
                result[b, h, t] = 1 - float(unit[t] @ mean) / float(mean.norm())
    return result


def scores_by_loops(window, bidirectional, value_norm, moment="mean", lookahead=0, keydiff_power=0.0, floor=0.0):
    """The definition, one query, one head and one key at a time, in Python floats."""
    batch, num_tokens, num_kv_heads, head_dim = window.keys.shape
    num_queries, num_heads = window.queries.shape[1:3]
    group_size = num_heads // num_kv_heads
    queries = queries_by_loops(window, lookahead)
    result = torch.zeros(batch, num_kv_heads, num_tokens, dtype=torch.float64)
    highest = torch.zeros(batch, num_heads, num_tokens, dtype=torch.float64)
    for b in range(batch):
        for head in range(num_heads):
            kv_head = head // group_size
            for q in range(num_queries):
                position = position_of(window, head % group_size, q)
                seen = [t for t in range(num_tokens) if bidirectional or t <= position]
                query = queries[b, q, head]
                weights = {
                    t: math.exp(float(query @ window.keys[b, t, kv_head].double()) / head_dim**0.5) for t in seen
                }
                for t in seen:
                    pairs = [(g, p) for g in range(group_size) for p in range(num_queries)]
                    judges = sum(bidirectional or position_of(window, *pair) >= t for pair in pairs)
                    weight = weights[t] / sum(weights.values())
                    power = 2 if moment == "rms" else 1
                    result[b, kv_head, t] += weight**power / judges
                    highest[b, head, t] = max(float(highest[b, head, t]), weight)
    if moment == "rms":
        result = result.sqrt()
    if moment == "max":
        result = highest.unflatten(1, (num_kv_heads, group_size)).mean(dim=2)
    result = result + floor / num_tokens
    if value_norm:
        result = result * window.values.double().norm(dim=-1).transpose(1, 2)
    return result * distinctness_by_loops(window) ** keydiff_power if keydiff_power else result


def assert_scores_close(actual, expected):
    # Sums of a few dozen terms in float32 against the same in float64.
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize("moment", ["mean", "rms", "max"])
@pytest.mark.parametrize("num_kv_heads, group_size", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_scores_equal_the_definition(bidirectional, value_norm, moment, num_kv_heads, group_size):
    window = random_window(num_kv_heads=num_kv_heads, group_size=group_size)
    kara = Kara(
        bidirectional=bidirectional, value_norm=value_norm, moment=moment,
        lookahead=0, keydiff_power=0.0, attention_floor=0.0,
    )  # fmt: skip
    assert_scores_close(kara.score(window), scores_by_loops(window, bidirectional, value_norm, moment))


@pytest.mark.parametrize("lookahead", [1, 7, 300])
@pytest.mark.parametrize("shifts", [None, [0, 1, 2], [0, 0, 5]])
@pytest.mark.parametrize(
    "rope",
    [
        Rope(frequencies(10000.0, 8)),
        Rope(frequencies(10000.0, 8), interleaved=True),
        Rope(frequencies(100.0, 4)),  # the second half of the dimensions is not rotated
        Rope(torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64), interleaved=True),
    ],
    ids=["halves", "interleaved", "partial", "partial interleaved"],
)
def test_queries_are_rotated_to_future_positions(rope, shifts, lookahead):
    shifts = None if shifts is None else torch.tensor(shifts)
    window = replace(random_window(), rope=rope, query_shifts=shifts)
    kara = Kara(lookahead=lookahead, keydiff_power=0.0, attention_floor=0.0)
    # float32 sines and cosines, on numbers up to about 7.
    ahead = kara.ahead(window).queries.double()
    torch.testing.assert_close(ahead, queries_by_loops(window, lookahead), rtol=1e-5, atol=2e-6)
    assert_scores_close(kara.score(window), scores_by_loops(window, True, True, lookahead=lookahead))
    assert not torch.allclose(kara.score(window), replace(kara, lookahead=0).score(window), rtol=0.01)


def test_distances_by_hand():
    """The newest query stands at 40. Of five, the oldest goes to 41, the next 0.618 of the range on, then 0.236, ..."""
    positions = torch.tensor([36, 40, 24, 28, 32])
    ahead = {24: 1, 28: 1 + 61, 32: 1 + 23, 36: 1 + 85, 40: 1 + 47}
    expected = [[40 - p + ahead[p], 40 - p + ahead[p] + 2] for p in positions.tolist()]
    assert ahead_distances(positions, torch.tensor([0, 2]), 100).tolist() == expected
    assert ahead_distances(positions, None, 100).tolist() == [[first] for first, _ in expected]
    assert ahead_distances(positions, None, 1).flatten().tolist() == [5, 1, 17, 13, 9]


def test_future_positions_cover_the_range_evenly():
    positions = torch.randperm(64, generator=torch.Generator().manual_seed(0)) * 4
    ahead = (ahead_distances(positions, None, 300)[:, 0] - (positions.max() - positions)).sort().values
    assert ahead.min() == 1 and ahead.max() <= 300
    assert ahead.diff().min() >= 2 and ahead.diff().max() <= 8  # 300 / 64 is 4.7


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("keydiff_power", [0.5, 2.0])
def test_keys_unlike_the_others_count_more(bidirectional, keydiff_power):
    window = random_window()
    kara = Kara(bidirectional=bidirectional, lookahead=0, keydiff_power=keydiff_power, attention_floor=0.0)
    expected = scores_by_loops(window, bidirectional, True, keydiff_power=keydiff_power)
    assert_scores_close(kara.score(window), expected)


@pytest.mark.parametrize("moment", ["mean", "rms", "max"])
def test_the_defaults_equal_the_definition(moment):
    window = random_window()
    expected = scores_by_loops(window, True, True, moment, lookahead=300, keydiff_power=2.0, floor=1.0)
    assert_scores_close(Kara(moment=moment).score(window), expected)


def test_with_a_high_floor_attention_does_not_matter():
    """Only the value's length and the key's distance remain."""
    window = random_window()
    expected = distinctness_by_loops(window) ** 2 * window.values.double().norm(dim=-1).transpose(1, 2)
    scores = Kara(attention_floor=1e6).score(window) / (1e6 / window.num_tokens)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-6)


def test_identical_keys_are_not_distinct():
    window = random_window()
    alike = replace(window, keys=window.keys[:, :1].expand_as(window.keys))
    scores = Kara().score(alike)
    assert (scores >= 0).all() and (scores < 1e-6).all()  # and not NaN: a cosine may round to above 1


def test_nothing_rotates_without_rope_or_in_the_causal_ablation():
    window = random_window()
    still, rotating = Kara(lookahead=0), Kara(lookahead=300)
    without = replace(window, rope=None)
    assert torch.equal(rotating.score(without), still.score(window))
    assert not torch.allclose(rotating.score(window), still.score(window), rtol=0.01)
    causal = replace(rotating, bidirectional=False)
    assert torch.equal(causal.score(window), replace(still, bidirectional=False).score(window))
    assert rotating.ahead(without) is without and still.ahead(window) is window and causal.ahead(window) is window
    assert rotating.uses_rope and not still.uses_rope and not causal.uses_rope


def test_a_key_is_judged_by_the_queries_before_it_only_when_bidirectional():
    """All queries lie before the last key and point at it."""
    window = random_window(batch=1, num_tokens=8, num_queries=2, num_kv_heads=1, group_size=1)
    window.query_positions.copy_(torch.tensor([3, 5]))
    window.keys[0, 7] = 10 * window.queries[0, 0]
    assert Kara(value_norm=False).score(window)[0, 0].argmax() == 7
    causal = Kara(value_norm=False, bidirectional=False, attention_floor=0.0).score(window)[0, 0]
    assert (causal[6:] == 0).all() and (causal[:6] > 0).all()


@pytest.mark.parametrize("moment", ["mean", "rms"])
def test_in_the_causal_ablation_a_head_sees_keys_up_to_its_own_query(moment):
    window = replace(random_window(), query_shifts=torch.tensor([0, 2, 3]))
    kara = Kara(bidirectional=False, moment=moment, keydiff_power=0.0, attention_floor=0.0)
    assert_scores_close(kara.score(window), scores_by_loops(window, False, True, moment))
    unshifted = kara.score(replace(window, query_shifts=None))
    assert not torch.allclose(kara.score(window), unshifted, rtol=0.01)


def test_a_query_before_the_window_sees_nothing_in_the_causal_ablation():
    window = random_window()
    window.query_positions.copy_(torch.tensor([-3, -2, -1, -1, 4]))
    scores = Kara(bidirectional=False, attention_floor=0.0).score(window)
    assert (scores[..., :5] > 0).all() and (scores[..., 5:] == 0).all()


def test_the_paper_form_is_plain_and_keeps_its_chunks():
    window = random_window()
    ours = Kara(max_chunk_size=5, moment="max", lookahead=50, keydiff_power=1.0, key_ridge=1.0)
    paper = replace(ours, variant="paper")
    assert paper == Kara(variant="paper", max_chunk_size=5) and paper.fused
    assert paper.lookahead == paper.keydiff_power == paper.attention_floor == 0 and not paper.uses_rope
    assert_scores_close(paper.score(window), scores_by_loops(window, True, False))


def test_fused_is_what_the_kernels_compute():
    assert Kara().fused and Kara(value_norm=False, max_chunk_size=1).fused
    assert Kara(lookahead=0).fused and Kara(keydiff_power=0.5).fused
    for options in ({"bidirectional": False}, {"moment": "rms"}):
        assert not Kara(**options).fused
    assert Kara(key_ridge=0.0).fused and Kara(value_ridge=0.0).fused


def test_refitting_changes_no_choice():
    window = random_window(dtype=torch.bfloat16)
    plain = Kara(key_ridge=0.0, value_ridge=0.0).compress(window, 6)
    assert plain.keys is None and plain.values is None
    rows = plain.indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 8)
    keys, values = window.keys.gather(1, rows), window.values.gather(1, rows)
    for kara, same_keys, same_values in (
        (Kara(value_ridge=0.0), False, True),
        (Kara(key_ridge=0.0), True, False),
        (Kara(), False, False),
    ):
        kept = kara.compress(window, 6)
        assert torch.equal(kept.indices, plain.indices)
        assert kept.keys is not None and kept.values is not None and kept.keys.dtype == torch.bfloat16
        assert torch.equal(kept.keys, keys) == same_keys and torch.equal(kept.values, values) == same_values


def test_more_survivors_than_can_be_told_apart_stay_as_they_are():
    window = random_window(num_tokens=MOST_REFITTED + 2)
    assert Kara().compress(window, MOST_REFITTED).keys is not None
    assert Kara().compress(window, MOST_REFITTED + 1).keys is None
    assert not Kara(variant="paper").refits(1)


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
    with pytest.raises(ValueError, match=r"chunk_fill=1.0: must be a number in \[0, 1\)"):
        make_method(KvConfig(method_options={"chunk_fill": 1.0}))
    with pytest.raises(ValueError, match="moment='median': must be one of mean, rms, max"):
        make_method(KvConfig(method_options={"moment": "median"}))
    with pytest.raises(ValueError, match="variant='papre': must be one of tuned, paper"):
        make_method(KvConfig(method_options={"variant": "papre"}))
    for lookahead in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"lookahead={lookahead}: must be an integer"):
            make_method(KvConfig(method_options={"lookahead": lookahead}))
    with pytest.raises(ValueError, match=r"keydiff_power=-0.5: must be a number in \[0, 16\]"):
        make_method(KvConfig(method_options={"keydiff_power": -0.5}))
    with pytest.raises(ValueError, match=r"attention_floor=-1: must be a number in \[0, 1e.06\]"):
        make_method(KvConfig(method_options={"attention_floor": -1}))
    with pytest.raises(ValueError, match="max_chunk_size=0: must be an integer >= 1"):
        make_method(KvConfig(method_options={"max_chunk_size": 0}))
