"""Which queries see which tokens if the heads of a query group take turns in the query ring."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvllm.methods.attention import observed_attention, seen, text_positions
from kvllm.methods.base import Window
from tests.methods.windows import random_window


def window_by_hand() -> Window:
    """Six tokens at 160 to 165; entries at 6, 2 and 5, the second head's queries two tokens older."""
    window = random_window(batch=1, num_tokens=6, num_queries=3, num_kv_heads=1, group_size=2)
    return replace(window, query_positions=torch.tensor([6, 2, 5]), query_shifts=torch.tensor([0, 2]))


def test_each_head_has_its_own_query_positions():
    window = window_by_hand()
    assert window.head_query_positions.tolist() == [[6, 2, 5], [4, 0, 3]]
    assert text_positions(window).tolist() == [[[[166, 162, 165], [164, 160, 163]]]]
    assert replace(window, query_shifts=None).head_query_positions.tolist() == [[6, 2, 5], [6, 2, 5]]


def test_a_head_sees_up_to_its_own_query():
    assert seen(window_by_hand()).sum(dim=-1).tolist() == [[[[6, 3, 6], [5, 1, 4]]]]


def test_only_queries_that_see_every_token_are_observed():
    """The first head's at 6 and 5, and none of the second's."""
    weights, mean = observed_attention(window_by_hand(), 3)
    total = weights.sum(dim=-1)[0, 0]  # [group_size, num_queries], oldest first
    torch.testing.assert_close(total, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(mean[0, 0, 0], weights[0, 0, 0, 1:].mean(dim=0))
    assert (mean[0, 0, 1] == 0).all()
