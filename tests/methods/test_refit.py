from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvllm.methods.refit import STEPS, gather_tokens, normal_equations, refit, ridge_solve
from tests.methods.windows import random_window

KEPT = torch.tensor([0, 3, 4, 9, 15, 23])


def few_queries(count):
    window = random_window(group_size=1, head_dim=16)
    return replace(window, queries=window.queries[:, :count], query_positions=window.query_positions[:count])


def kept_of(window):
    return KEPT.expand(*window.keys.shape[0:1], window.num_kv_heads, -1)


def refitted(window, indices, key_ridge, value_ridge):
    keys, values = gather_tokens(window.head_keys, indices), gather_tokens(window.head_values, indices)
    return refit(window.scaled_queries, keys, values, window.attended, key_ridge, value_ridge)


def solved(rows, targets, ridge, steps=STEPS):
    return ridge_solve(*normal_equations(rows, targets), ridge, steps)


def random_problem():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 4, generator=g), torch.randn(2, 7, 3, generator=g)


def objective(rows, targets, ridge, solution):
    """[batch, columns]: what `ridge_solve` minimises."""
    strength = ridge * rows.square().sum(dim=1).mean(dim=-1)[:, None]
    return (rows @ solution - targets).square().sum(dim=1) + strength * solution.square().sum(dim=1)


def test_as_many_steps_as_columns_are_least_squares_with_rows_of_zeros_below():
    rows, targets = random_problem()
    strength = 0.3 * rows.square().sum(dim=1).mean(dim=-1)
    below = strength.sqrt()[:, None, None] * torch.eye(4)
    expected = torch.linalg.lstsq(torch.cat([rows, below], 1), torch.cat([targets, torch.zeros(2, 4, 3)], 1)).solution
    torch.testing.assert_close(solved(rows, targets, 0.3, steps=4), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(solved(rows, targets, 0.3, steps=20), expected, rtol=1e-4, atol=1e-5)


def test_every_step_reduces_the_error():
    rows, targets = random_problem()
    reached = [objective(rows, targets, 0.3, solved(rows, targets, 0.3, steps)) for steps in range(5)]
    assert torch.equal(reached[0], targets.square().sum(dim=1))
    assert all((after < before).all() for before, after in zip(reached, reached[1:], strict=False))


def test_few_queries_are_fitted_by_a_weak_ridge_however_uneven_their_weights():
    """A step more than there are queries must not undo the fit: only rounding errors are left to follow."""
    g = torch.Generator().manual_seed(0)
    rows = (2 * torch.randn(200, 3, 6, generator=g)).softmax(dim=-1)
    rows = rows[torch.linalg.svdvals(rows)[:, -1] > 0.1]  # that tell the columns apart
    targets = torch.randn(len(rows), 3, 4, generator=g)
    assert len(rows) > 150
    torch.testing.assert_close(rows @ solved(rows, targets, 1e-6), targets, rtol=0, atol=1e-3)


def test_each_column_is_solved_by_itself():
    rows, targets = random_problem()
    alone = [solved(rows, targets[..., i : i + 1], 0.3) for i in range(3)]
    torch.testing.assert_close(solved(rows, targets, 0.3), torch.cat(alone, dim=-1))


def test_nothing_to_solve_leaves_zeros():
    rows, targets = random_problem()
    assert torch.equal(solved(torch.zeros(5, 4), torch.ones(5, 1), 1.0), torch.zeros(4, 1))
    targets[..., 1] = 0.0
    solution = solved(rows, targets, 0.3)
    assert solution.isfinite().all() and (solution[..., 1] == 0).all() and (solution[..., 0] != 0).all()
    done = torch.tensor([[2.0], [0.0]])  # one step solves it exactly, to a residual of 0
    assert torch.equal(solved(torch.eye(2), done, 1.0), done / 2)


def test_shifted_keys_restore_the_weight_of_the_window():
    window = few_queries(3)  # fewer than dimensions, so that a shift can serve them all
    indices = kept_of(window)
    keys, _ = refitted(window, indices, 1e-6, 0)
    queries = window.grouped_queries()[:, :, 0]
    before = window.logits()[:, :, 0].logsumexp(dim=-1)
    after = (queries @ keys.transpose(-1, -2) / 4).logsumexp(dim=-1)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("key_ridge", [0.0, 1e-6])
def test_refitted_values_restore_the_output_of_the_window(key_ridge):
    window = few_queries(3)  # fewer than kept tokens
    indices = kept_of(window)
    keys, values = refitted(window, indices, key_ridge, 1e-6)  # the keys shifted or not
    queries = window.grouped_queries()[:, :, 0]
    brought = window.logits()[:, :, 0].softmax(dim=-1) @ window.values.transpose(1, 2)
    torch.testing.assert_close(
        (queries @ keys.transpose(-1, -2) / 4).softmax(dim=-1) @ values, brought, atol=1e-3, rtol=0
    )


def test_each_request_is_refitted_by_itself():
    """Bit for bit; otherwise a request's survivors would depend on the rest of its batch."""
    window = random_window()
    indices = kept_of(window)
    alone = replace(window, **{name: getattr(window, name)[:1] for name in ("queries", "keys", "values")})
    for together, single in zip(
        refitted(window, indices, 0.1, 0.1), refitted(alone, indices[:1], 0.1, 0.1), strict=True
    ):
        assert torch.equal(together[:1], single)


@pytest.mark.parametrize("ridge", [1e8, 1e12])
def test_a_strong_ridge_changes_nothing(ridge):
    window = random_window()
    indices = kept_of(window)
    keys, values = refitted(window, indices, ridge, ridge)
    torch.testing.assert_close(keys, gather_tokens(window.head_keys, indices), rtol=0, atol=1e-5)
    torch.testing.assert_close(values, gather_tokens(window.head_values, indices))


def test_where_everything_is_kept_nothing_changes():
    window = random_window()
    indices = torch.arange(24).expand(2, 2, -1)
    keys, values = refitted(window, indices, 0.1, 0.1)
    torch.testing.assert_close(keys, window.head_keys, rtol=0, atol=1e-5)
    torch.testing.assert_close(values, window.head_values, rtol=1e-4, atol=1e-5)
