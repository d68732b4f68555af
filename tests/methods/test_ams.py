from __future__ import annotations

import pytest
import torch

from kvllm.methods.ams import AMS, cut_by_mass, slot_priority
from kvllm.methods.base import top_k
from kvllm.methods.rkv import RKV
from tests.methods.loops import behind, group_size, newest, per_head, pooled, weights
from tests.methods.test_all_methods import WINDOWS


def segments_by_loops(mass, segment_mass, min_segment, max_segment):
    segment, number, length, total = [], 0, 0, 0.0
    for m in mass:
        segment.append(number)
        length, total = length + 1, total + m
        if length >= max_segment or (total >= segment_mass and length >= min_segment):
            number, length, total = number + 1, 0, 0.0
    return segment


def quotas_by_loops(segment, mass, num_kept, min_quota):
    """Slots one at a time: a turn for each segment up to `min_quota`, then to the largest mass per slot."""
    lengths = [segment.count(s) for s in range(max(segment) + 1)]
    masses = [sum(m for m, number in zip(mass, segment, strict=True) if number == s) for s in range(len(lengths))]
    quota = [0] * len(lengths)
    for _ in range(num_kept):
        open_ones = [s for s in range(len(lengths)) if quota[s] < lengths[s]]
        early = [s for s in open_ones if quota[s] < min_quota]
        if early:
            chosen = min(early, key=lambda s: (quota[s], s))
        else:
            chosen = max(open_ones, key=lambda s: (masses[s] / (quota[s] - min_quota + 1), -s))
        quota[chosen] += 1
    return quota


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(0.02, 1, 50), (0.1, 3, 8), (0.5, 4, 6), (0.3, 7, 7), (1.0, 1, 100), (0.05, 60, 60)])
def test_segments_equal_a_scan(seed, sizes):
    mass = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(seed)) ** 4
    mass = mass / mass.sum(dim=-1, keepdim=True)
    segment = cut_by_mass(mass, *sizes)
    for row, expected in zip(segment.flatten(0, 1), mass.double().flatten(0, 1), strict=True):
        assert row.tolist() == segments_by_loops(expected.tolist(), *sizes)


@pytest.mark.parametrize("min_quota", [0, 1, 4, 30])
@pytest.mark.parametrize("num_kept", [1, 6, 20, 49])
def test_quotas_equal_slots_given_out_one_by_one(min_quota, num_kept):
    generator = torch.Generator().manual_seed(num_kept)
    mass, scores = torch.rand(1, 4, 50, generator=generator) ** 3, torch.randn(1, 4, 50, generator=generator)
    mass = mass / mass.sum(dim=-1, keepdim=True)
    segment = cut_by_mass(mass, 0.15, 3, 20)
    kept = top_k(slot_priority(scores, mass, segment, min_quota), num_kept)
    for h in range(4):
        numbers, score = segment[0, h].tolist(), scores[0, h].tolist()
        quota = quotas_by_loops(numbers, mass[0, h].double().tolist(), num_kept, min_quota)
        expected: list[int] = []
        for s, slots in enumerate(quota):
            members = [t for t in range(50) if numbers[t] == s]
            expected += sorted(members, key=lambda t: -score[t])[:slots]
        assert kept[0, h].tolist() == sorted(expected)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "group_size 1"])
def test_mass_is_the_pooled_attention_of_the_buffers_queries(name):
    window = WINDOWS[name]

    def mass(b, h):
        heads = []
        for g in range(group_size(window)):
            entries = behind(window, g, newest(window, 4))
            mean = torch.stack([weights(window, b, h, g, q) for q in entries]).mean(dim=0)
            heads.append(torch.tensor(pooled(mean.tolist(), 5), dtype=torch.float64))
        total = torch.stack(heads).sum(dim=0)
        return total / total.sum()

    expected = per_head(window, mass)
    segment = cut_by_mass(expected, 0.1, 3, 9)
    base = RKV(similarity_threshold=0.7)
    priority = slot_priority(base.score(window), expected, segment, 2)
    method = AMS(
        base_options={"similarity_threshold": 0.7},
        num_observed=4,
        segment_mass=0.1,
        min_segment=3,
        max_segment=9,
        min_quota=2,
    )
    torch.testing.assert_close(method.score(window), priority, rtol=1e-5, atol=1e-6)
    assert torch.equal(method.compress(window, 11).indices, top_k(priority, 11))


def test_refusals():
    with pytest.raises(ValueError, match="max_segment=8: must be at least min_segment=32"):
        AMS(max_segment=8)
    with pytest.raises(ValueError, match=r"segment_mass=2: must be a number in \[0, 1\]"):
        AMS(segment_mass=2)
    with pytest.raises(ValueError, match="min_quota=-1"):
        AMS(min_quota=-1)
    with pytest.raises(ValueError, match="base='rkw': no such method; did you mean 'rkv'"):
        AMS(base="rkw")
