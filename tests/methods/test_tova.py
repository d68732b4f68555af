from __future__ import annotations

import pytest
import torch

from kvllm.methods.tova import TOVA
from tests.methods.loops import group_size, newest, per_head, weights
from tests.methods.test_all_methods import WINDOWS


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "group_size 1"])
def test_scores_equal_the_definition(name):
    window = WINDOWS[name]
    [last] = newest(window, 1)

    def score(b, h):  # the same for every h
        heads = [(kv, g) for kv in range(window.num_kv_heads) for g in range(group_size(window))]
        return torch.stack([weights(window, b, kv, g, last) for kv, g in heads]).mean(dim=0)

    torch.testing.assert_close(TOVA().score(window), per_head(window, score), rtol=1e-5, atol=1e-7)


def test_all_heads_of_a_layer_share_one_choice():
    kept = TOVA().compress(WINDOWS["num_kv_heads 1"], 7).indices
    assert kept.shape[1] == 1
    kept = TOVA().compress(WINDOWS["group_size 1"], 7).indices
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert not torch.equal(kept[0], kept[1])  # a choice for each layer
