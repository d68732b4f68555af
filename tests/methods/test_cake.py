from __future__ import annotations

import pytest
import torch

from kvllm.methods.cake import CAKE, preferences
from tests.methods.windows import random_window


def by_loops(window, num_observed):
    """[batch, num_kv_heads, group_size] of (mean, variance) over the queries, in float64, one head at a time."""
    batch, num_tokens, num_kv_heads, head_dim = window.keys.shape
    group_size = window.queries.shape[2] // num_kv_heads
    newest = window.query_positions.argsort()[-num_observed:].tolist()
    shifts = [0] * group_size if window.query_shifts is None else window.query_shifts.tolist()
    for b in range(batch):
        for h in range(num_kv_heads):
            keys = window.keys[b, :, h].double()
            for g in range(group_size):
                queries = [q for q in newest if int(window.query_positions[q]) - shifts[g] >= num_tokens - 1]
                rows = [window.queries[b, q, h * group_size + g].double() @ keys.T / head_dim**0.5 for q in queries]
                weights = torch.stack([row.softmax(dim=0) for row in rows])
                yield b, h, g, weights.mean(dim=0), weights.var(dim=0, correction=0)


@pytest.mark.parametrize("kernel_size, gamma", [(1, 200.0), (5, 0.0), (5, 3.0)])
def test_scores_equal_the_definition(kernel_size, gamma):
    window = random_window(batch=2, num_kv_heads=2, group_size=3)
    expected = torch.zeros(2, 2, window.num_tokens, dtype=torch.float64)
    half = kernel_size // 2
    for b, h, _, mean, variance in by_loops(window, 8):
        raw = mean + gamma * variance
        for t in range(window.num_tokens):
            expected[b, h, t] += raw[max(0, t - half) : t + half + 1].mean() / 3
    actual = CAKE(num_observed=8, kernel_size=kernel_size, gamma=gamma).score(window)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau1, tau2", [(1.0, 1.0), (2.0, 0.5)])
def test_preferences_equal_the_definition(tau1, tau2):
    window = random_window(batch=2, num_kv_heads=2, group_size=3)
    entropy, spread = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for b, _, _, mean, variance in by_loops(window, 8):
        entropy[b] -= (mean * mean.log()).sum() / 6
        spread[b] += variance.sum() / 6
    expected = entropy ** (1 / tau1) * spread ** (1 / tau2)
    torch.testing.assert_close(preferences(window, 8, tau1, tau2), expected.float(), rtol=1e-4, atol=1e-7)
