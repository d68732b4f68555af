from __future__ import annotations

import pytest
import torch

from kvllm.methods.longflow import LongFlow
from tests.methods.loops import group_size, newest, per_head, weights
from tests.methods.test_all_methods import WINDOWS
from tests.methods.windows import random_window


def scores_by_loops(window):
    def score(b, _):
        total = torch.zeros(window.num_tokens, dtype=torch.float64)
        for h in range(window.num_kv_heads):
            for g in range(group_size(window)):
                row = weights(window, b, h, g, newest(window, 1)[0])
                for t in range(window.num_tokens):
                    total[t] += sum(abs(float(row[t]) * x) for x in window.values[b, t, h].double().tolist())
        return total

    return per_head(window, score)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "group_size 1"])
def test_scores_equal_the_definition(name):
    window = WINDOWS[name]
    torch.testing.assert_close(LongFlow().score(window), scores_by_loops(window), rtol=1e-5, atol=1e-6)


def test_all_heads_of_a_layer_keep_the_same_tokens():
    kept = LongFlow().compress(random_window(batch=3), 5).indices
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert not torch.equal(kept[0], kept[1])
