from __future__ import annotations

from typing import Any

import pytest
import torch

from kvllm.config import KvConfig
from kvllm.methods import make_method
from kvllm.methods.keydiff import KeyDiff
from kvllm.methods.thinkv import ThinKV
from tests.methods.loops import group_size, position_of, weights
from tests.methods.test_all_methods import WINDOWS
from tests.methods.windows import random_window

OPTIONS: dict[str, Any] = dict(
    segment_size=6, sparsity_cut=0.05, execution_above=0.3, transition_above=0.45, min_quota=1
)  # fmt: skip


def stretches(window, b, h, size) -> list[list[int]]:
    """Tokens of each stretch of `size` positions that has any."""
    first = int(window.positions[b, h, 0])
    made: dict[int, list[int]] = {}
    for t in range(window.num_tokens):
        made.setdefault((int(window.positions[b, h, t]) - first) // size, []).append(t)
    return list(made.values())


def sparsity_of(window, b, h, tokens, cut) -> float:
    last, shares = int(window.positions[b, h, tokens[-1]]), []
    for g in range(group_size(window)):
        for q in range(window.queries.shape[1]):
            at = int(window.positions[b, h, -1]) + position_of(window, g, q) - (window.num_tokens - 1)
            if at >= last:
                row = weights(window, b, h, g, q)[tokens]
                shares.append(sum(x < cut * max(row.tolist()) for x in row.tolist()) / len(tokens))
    return sum(shares) / len(shares) if shares else 0.0


def kept_by_loops(method, window, b, h, num_kept) -> list[int]:
    """Slots are given out one at a time: first each stretch's least, then to the one with the most per token kept."""
    groups = stretches(window, b, h, method.segment_size)
    sparse = [sparsity_of(window, b, h, tokens, method.sparsity_cut) for tokens in groups]
    shares = []
    for i, s in enumerate(sparse):
        share = 1.0 if s < method.execution_above else method.execution_share
        share = share if s < method.transition_above else method.transition_share
        later = sum(x >= method.transition_above for x in sparse[i + 1 :])
        shares.append((share * method.decay**later + 1e-6) * len(groups[i]))
    scores = KeyDiff().score(window)[b, h].tolist()
    left = [sorted(tokens, key=lambda t: (-scores[t], t)) for tokens in groups]
    kept: list[int] = []
    quotas = [0] * len(groups)
    while len(kept) < num_kept:
        poor = [i for i, rest in enumerate(left) if rest and quotas[i] < method.min_quota]
        if poor:
            i = min(poor, key=lambda i: (quotas[i], left[i][0]))
        else:
            i = max(
                (i for i, rest in enumerate(left) if rest), key=lambda i: shares[i] / (quotas[i] - method.min_quota + 1)
            )
        kept.append(left[i].pop(0))
        quotas[i] += 1
    return sorted(kept)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "some queries before the window"])
def test_what_stays_equals_the_definition(name):
    window, method = WINDOWS[name], ThinKV(**OPTIONS)
    for num_kept in (9, 14):
        kept = method.compress(window, num_kept).indices
        for b in range(len(window.keys)):
            for h in range(window.num_kv_heads):
                assert kept[b, h].tolist() == kept_by_loops(method, window, b, h, num_kept)


def of_three_stretches():
    """24 tokens whose middle third is a transition: each query attends to only one of its tokens."""
    window = random_window(batch=1, num_kv_heads=1, group_size=1)
    window.queries[...] = torch.eye(8)[0]
    window.query_positions.copy_(torch.arange(24, 29))
    window.keys[...] = torch.randn(24, 1, 8) * torch.tensor([0.0] + 7 * [1.0])
    window.keys[0, 10, 0, 0] = 100.0
    return window


def test_a_transition_keeps_less_and_ages_what_is_before_it():
    method = ThinKV(segment_size=8, min_quota=0)
    kept = method.compress(of_three_stretches(), 12).indices.flatten()
    before, transition, after = (int(((kept >= i) & (kept < i + 8)).sum()) for i in (0, 8, 16))
    assert (before, transition, after) == (4, 2, 6) or after > before > transition
    even = ThinKV(segment_size=8, min_quota=0, transition_above=1.0, execution_above=1.0)
    kept = even.compress(of_three_stretches(), 12).indices.flatten()
    assert [int(((kept >= i) & (kept < i + 8)).sum()) for i in (0, 8, 16)] == [4, 4, 4]


def test_thresholds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="transition_above=0.2: must be at least execution_above=0.5"):
        make_method(KvConfig(method="thinkv", method_options={"transition_above": 0.2}))
