from __future__ import annotations

from dataclasses import replace

import torch

from kvllm.config import KvConfig
from kvllm.methods import make_method
from kvllm.methods.random_ import Random, mix
from tests.methods.windows import random_window

WINDOW = random_window(batch=4, num_tokens=2000, num_kv_heads=3)


def lowbias32(x: int) -> int:
    """The published hash, on Python's unbounded integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_the_hash_is_lowbias32():
    numbers = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    assert mix(torch.tensor(numbers)).tolist() == [lowbias32(x) for x in numbers]


def test_scores_depend_only_on_seed_layer_head_and_position():
    scores = Random(seed=3).score(WINDOW)
    for b, head, t in [(0, 0, 0), (3, 2, 1999), (1, 1, 77)]:
        state = lowbias32(int(WINDOW.layers[b]) + lowbias32(3))
        state = lowbias32((state + head) % 2**32)
        draw = lowbias32((state + int(WINDOW.positions[b, head, t])) % 2**32)
        assert scores[b, head, t] == (draw >> 8) / 2**24


def test_the_draw_of_a_token_does_not_depend_on_its_window():
    """The last 500 tokens as a window of their own: the same scores."""
    tail = replace(WINDOW, keys=WINDOW.keys[:, 1500:], positions=WINDOW.positions[..., 1500:])
    assert torch.equal(Random().score(tail), Random().score(WINDOW)[..., 1500:])


def test_draws_look_uniform_and_unrelated():
    """Bounds of five standard deviations, for draws that are fixed by their seeds."""
    draws = torch.stack([Random(seed=s).score(WINDOW) for s in range(3)]).flatten(0, 2)  # [rows, 2000]
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(dim=-1) - 0.5).abs().max() < 5 * (1 / 12 / 2000) ** 0.5
    correlations = torch.corrcoef(draws) - torch.eye(len(draws))  # between layers, heads and seeds
    assert correlations.abs().max() < 5 / 2000**0.5


def test_the_seed_comes_from_the_config():
    assert make_method(KvConfig(method="random", seed=7)) == Random(seed=7)
