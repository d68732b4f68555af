from __future__ import annotations

import pytest
import torch

from kvllm.methods.snapkv import SnapKV
from tests.methods.windows import random_window


def scores_by_loops(window, num_observed, kernel_size):
    """The definition in float64, one head and one query at a time."""
    batch, num_tokens, num_kv_heads, head_dim = window.keys.shape
    group_size = window.queries.shape[2] // num_kv_heads
    newest = sorted(range(window.queries.shape[1]), key=lambda q: -int(window.query_positions[q]))[:num_observed]
    result = torch.zeros(batch, num_kv_heads, num_tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_kv_heads):
            keys = window.keys[b, :, h].double()
            weights = torch.zeros(num_tokens, dtype=torch.float64)
            for q in newest:
                heads = window.queries[b, q, h * group_size : (h + 1) * group_size].double()
                weights += (heads @ keys.T / head_dim**0.5).max(dim=0).values.softmax(dim=0) / len(newest)
            for t in range(num_tokens):
                half = kernel_size // 2
                result[b, h, t] = weights[max(0, t - half) : t + half + 1].max()
    return result


@pytest.mark.parametrize("num_observed, kernel_size", [(1, 7), (3, 1), (3, 7), (50, 5)])
@pytest.mark.parametrize("num_kv_heads, group_size", [(1, 1), (2, 3)])
def test_scores_equal_the_definition(num_observed, kernel_size, num_kv_heads, group_size):
    window = random_window(num_kv_heads=num_kv_heads, group_size=group_size)
    actual = SnapKV(num_observed=num_observed, kernel_size=kernel_size).score(window)
    expected = scores_by_loops(window, num_observed, kernel_size).float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_only_the_newest_queries_count_in_any_order():
    window = random_window()
    scores = SnapKV(num_observed=2).score(window)
    older = window.query_positions.argsort()[:-2]
    window.queries[:, older] = 100.0
    assert torch.equal(SnapKV(num_observed=2).score(window), scores)


def test_options():
    with pytest.raises(ValueError, match="kernel_size=4: must be odd"):
        SnapKV(kernel_size=4)
    with pytest.raises(ValueError, match="num_observed=0: must be an integer >= 1"):
        SnapKV(num_observed=0)
