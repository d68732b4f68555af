from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvllm.methods.refit import gather_tokens, refit_values, ridge_solve, shift_keys
from tests.methods.windows import random_window

KEPT = torch.tensor([0, 3, 4, 9, 15, 23])


def few_queries(count):
    window = random_window(group_size=1, head_dim=16)
    return replace(window, queries=window.queries[:, :count], query_positions=window.query_positions[:count])


def kept_of(window):
    return KEPT.expand(*window.keys.shape[0:1], window.num_kv_heads, -1)


def test_ridge_solve_is_least_squares_with_rows_of_zeros_below():
    g = torch.Generator().manual_seed(0)
    rows, targets = torch.randn(2, 7, 4, generator=g), torch.randn(2, 7, 3, generator=g)
    strength = 0.3 * rows.square().sum(dim=1).mean(dim=-1)
    below = strength.sqrt()[:, None, None] * torch.eye(4)
    expected = torch.linalg.lstsq(torch.cat([rows, below], 1), torch.cat([targets, torch.zeros(2, 4, 3)], 1)).solution
    torch.testing.assert_close(ridge_solve(rows, targets, 0.3), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ridge_solve(torch.zeros(5, 4), torch.ones(5, 1), 1.0), torch.zeros(4, 1))


def test_shifted_keys_win_back_the_weight_of_the_window():
    window = few_queries(3)  # fewer than dimensions, so that a shift can serve them all
    indices = kept_of(window)
    keys = gather_tokens(window.keys, indices) + shift_keys(window, indices, 1e-6)
    queries = window.grouped_queries()[:, :, 0]
    before = window.logits()[:, :, 0].logsumexp(dim=-1)
    after = (queries @ keys.transpose(-1, -2) / 4).logsumexp(dim=-1)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_refitted_values_bring_what_the_window_brought():
    window = few_queries(3)  # fewer than kept tokens
    indices = kept_of(window)
    keys = gather_tokens(window.keys, indices)
    values = refit_values(window, indices, keys, 1e-6)
    queries = window.grouped_queries()[:, :, 0]
    brought = window.logits()[:, :, 0].softmax(dim=-1) @ window.values.transpose(1, 2)
    torch.testing.assert_close(
        (queries @ keys.transpose(-1, -2) / 4).softmax(dim=-1) @ values, brought, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("ridge", [1e8, 1e12])
def test_a_strong_ridge_changes_nothing(ridge):
    window = random_window()
    indices = kept_of(window)
    keys, values = gather_tokens(window.keys, indices), gather_tokens(window.values, indices)
    assert shift_keys(window, indices, ridge).abs().max() < 1e-5
    torch.testing.assert_close(refit_values(window, indices, keys, ridge), values)


def test_where_everything_is_kept_nothing_changes():
    window = random_window()
    indices = torch.arange(24).expand(2, 2, -1)
    keys = gather_tokens(window.keys, indices)
    assert shift_keys(window, indices, 0.1).abs().max() < 1e-5
    torch.testing.assert_close(
        refit_values(window, indices, keys, 0.1), window.values.transpose(1, 2), rtol=1e-4, atol=1e-5
    )
