from __future__ import annotations

import pytest
import torch

from kvllm.methods.defensivekv import DefensiveKV, carries_mass
from tests.methods.loops import behind, group_size, newest, pooled, weights
from tests.methods.test_all_methods import WINDOWS
from tests.methods.windows import random_window


def kept_by_loops(window, b, h, num_kept, method):
    """The stages of the paper, one after the other."""
    size = group_size(window)
    entries = newest(window, method.num_observed)
    heads = [[weights(window, b, h, g, q) for q in behind(window, g, entries)] for g in range(size)]
    rows = [row for head in heads for row in head]
    mean = torch.stack([torch.stack(head).mean(dim=0) for head in heads]).mean(dim=0).tolist()
    order = sorted(range(window.num_tokens), key=lambda t: -mean[t])
    kept: list[int] = []
    mass = 0.0
    for t in order:
        mass += mean[t] / sum(mean)
        if mass >= method.first_mass or len(kept) == num_kept:
            break
        kept.append(t)
    smooth = []
    for row in rows:
        x = pooled(row.tolist(), method.kernel_size)
        smooth.append([v / sum(x) * float(row.sum()) for v in x])
    worst = [max(row[t] for row in smooth) for t in range(window.num_tokens)]
    floor = sum(worst) / len(worst)
    value = window.values[b, :, h].double().abs().sum(dim=-1).tolist()
    rest = sorted(
        (t for t in range(window.num_tokens) if t not in kept), key=lambda t: -max(worst[t], floor) * value[t]
    )
    return sorted(kept + rest[: num_kept - len(kept)]), len(kept)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "group_size 1"])
@pytest.mark.parametrize("first_mass", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("num_kept", [3, 12, 20])
def test_the_kept_tokens_equal_the_stages(name, first_mass, num_kept):
    window = WINDOWS[name]
    method = DefensiveKV(first_mass=first_mass)
    kept = method.compress(window, num_kept).indices
    for b in range(len(window.keys)):
        for h in range(window.num_kv_heads):
            expected, _ = kept_by_loops(window, b, h, num_kept, method)
            assert kept[b, h].tolist() == expected


def test_the_test_above_uses_both_stages():
    window = WINDOWS["window"]
    _, first = kept_by_loops(window, 0, 0, 12, DefensiveKV(first_mass=0.5))
    assert 0 < first < 12


def test_one_query_is_enough_to_save_a_token():
    """A key that a single query needs is kept, although its mean attention is small."""
    window = random_window(batch=1, num_tokens=40, num_queries=20, num_kv_heads=1, group_size=1)
    window.queries[:] = 0.0
    window.query_positions[:] = torch.arange(39, 59)
    window.keys[0, 10, 0] = torch.tensor([9.0] + [0.0] * 7)
    window.queries[0, 4, 0] = torch.tensor([9.0] + [0.0] * 7)
    window.values[:] = 1.0
    kept = DefensiveKV(first_mass=0.0, kernel_size=1).compress(window, 1).indices
    assert kept.tolist() == [[[10]]]


def test_carries_mass_stops_before_the_share_is_reached():
    carried = carries_mass(torch.tensor([[[0.1, 0.5, 0.15, 0.25]]]), 0.8)
    assert carried.tolist() == [[[False, True, False, True]]]


def test_refusals():
    with pytest.raises(ValueError, match=r"first_mass=1.1: must be a number in \[0, 1\]"):
        DefensiveKV(first_mass=1.1)
    with pytest.raises(ValueError, match="kernel_size=2: must be odd"):
        DefensiveKV(kernel_size=2)
    with pytest.raises(ValueError, match="num_observed=0: must be an integer >= 1"):
        DefensiveKV(num_observed=0)
