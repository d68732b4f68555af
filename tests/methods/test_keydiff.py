from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvllm.methods.keydiff import KeyDiff
from tests.methods.loops import per_head
from tests.methods.test_all_methods import WINDOWS


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1"])
def test_scores_equal_the_definition(name):
    window = WINDOWS[name]

    def score(b, h):
        keys = [k.double() for k in window.keys[b, :, h]]
        anchor = sum(k / k.norm() for k in keys) / len(keys)
        return torch.stack([-(k @ anchor) / (k.norm() * anchor.norm()) for k in keys])

    torch.testing.assert_close(KeyDiff().score(window), per_head(window, score), rtol=1e-5, atol=1e-6)


def test_queries_do_not_matter():
    window = WINDOWS["window"]
    before = KeyDiff().score(window)
    other = replace(window, queries=torch.full_like(window.queries, torch.nan))
    assert torch.equal(KeyDiff().score(other), before)
