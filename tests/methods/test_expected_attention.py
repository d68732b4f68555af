from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvllm.methods.expected_attention import ExpectedAttention
from kvllm.methods.rope import unrotate
from tests.methods.loops import group_size, per_head
from tests.methods.test_all_methods import WINDOWS


def rotation(position, theta, dim):
    """RoPE as a matrix."""
    half = dim // 2
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / dim), dtype=torch.float64)
        matrix[i, i] = matrix[i + half, i + half] = angle.cos()
        matrix[i + half, i], matrix[i, i + half] = angle.sin(), -angle.sin()
    return matrix


def by_loops(window, method):
    """The paper's form: mean and covariance before RoPE, both rotated by the average future rotation."""
    dim = window.keys.shape[-1]

    def score(b, h):
        rows = []
        newest = int(window.positions[b, h, -1] + window.query_positions.max()) - (window.num_tokens - 1)
        for g in range(group_size(window)):
            queries = window.queries[b, :, h * group_size(window) + g].double()
            average = torch.eye(dim, dtype=torch.float64)
            if method.rope_theta is not None:
                shift = 0 if window.query_shifts is None else int(window.query_shifts[g])
                positions = int(window.positions[b, h, -1]) + window.query_positions - (window.num_tokens - 1) - shift
                rotations = [rotation(-int(p), method.rope_theta, dim) for p in positions]
                queries = torch.stack([rotation @ q for rotation, q in zip(rotations, queries, strict=True)])
                future = range(newest + 1, newest + 1 + method.num_future_tokens)
                average = sum(rotation(p, method.rope_theta, dim) for p in future) / len(future)
            mean = average @ queries.mean(dim=0)
            centred = queries - queries.mean(dim=0)
            covariance = average @ (centred.T @ centred / len(queries)) @ average.T
            keys = window.keys[b, :, h].double()
            exponent = keys @ mean / dim**0.5
            if method.use_covariance:
                exponent += torch.stack([k @ covariance @ k for k in keys]) / (2 * dim)
            rows.append(exponent.softmax(dim=0))
        result = torch.stack(rows).mean(dim=0)
        if method.use_value_norm:
            result = (result + method.epsilon) * window.values[b, :, h].double().norm(dim=-1)
        return result

    return per_head(window, score)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "no RoPE and no turns"])
@pytest.mark.parametrize(
    "method",
    [
        ExpectedAttention(),
        ExpectedAttention(use_covariance=False, use_value_norm=False),
        ExpectedAttention(rope_theta=100.0, num_future_tokens=20, epsilon=0.01),
        ExpectedAttention(rope_theta=10000.0, num_future_tokens=3, use_covariance=False),
    ],
    ids=["as stored", "mean only", "future", "future, mean only"],
)
def test_scores_equal_the_definition(name, method):
    window = WINDOWS[name]
    torch.testing.assert_close(method.score(window), by_loops(window, method), rtol=2e-4, atol=1e-6)


def test_the_queries_of_a_head_are_at_its_own_tokens():
    """What its shifts say of a group makes a difference with the rotation undone, and none without."""
    window = WINDOWS["window"]
    for method, same in ((ExpectedAttention(), True), (ExpectedAttention(rope_theta=100.0), False)):
        scores, unshifted = method.score(window), method.score(replace(window, query_shifts=None))
        assert torch.allclose(scores, unshifted, rtol=1e-3) == same


def test_with_rope_theta_only_the_position_before_rope_counts():
    """Queries that are the same vector before RoPE at every position: rotated to future positions, without variance."""
    window = WINDOWS["window"]
    last = torch.full_like(window.query_positions, int(window.query_positions.max()))
    method = ExpectedAttention(rope_theta=100.0, num_future_tokens=4)
    one = window.queries[:, :1].expand_as(window.queries)
    assert window.query_shifts is not None
    members = window.query_shifts.repeat(window.num_kv_heads)  # of each head
    positions = 160 + window.query_positions.view(1, -1, 1) - members
    at_last = replace(window, queries=one, query_positions=last, query_shifts=None)
    # Rotated back from the last position to each.
    shifted = unrotate(one, (160 + last).view(1, -1, 1) - positions, 100.0)
    spread = replace(window, queries=shifted)
    torch.testing.assert_close(method.score(spread), method.score(at_last), rtol=1e-4, atol=1e-6)


def test_refusals():
    for value in (0, "10000", True, -1.0):
        with pytest.raises(ValueError, match="rope_theta=.*config.json"):
            ExpectedAttention(rope_theta=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_future_tokens=0: must be an integer"):
        ExpectedAttention(num_future_tokens=0)
    with pytest.raises(ValueError, match=r"epsilon=-1: must be a number in \[0, 1\]"):
        ExpectedAttention(epsilon=-1)
