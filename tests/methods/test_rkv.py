from __future__ import annotations

import pytest
import torch

from kvllm.methods.rkv import RKV, redundancy
from kvllm.methods.snapkv import SnapKV
from tests.methods.loops import per_head
from tests.methods.test_all_methods import WINDOWS
from tests.methods.windows import random_window


def redundancy_by_loops(keys, threshold):
    keys = [k.double() / (k.double().norm() + 1e-8) for k in keys]
    num_tokens = len(keys)
    total = torch.zeros(num_tokens, dtype=torch.float64)
    for i in range(num_tokens):
        row = [0.0 if i == j else float(keys[i] @ keys[j]) for j in range(num_tokens)]
        similar = [j for j in range(num_tokens) if row[j] > threshold]
        row[similar[-1] if similar else 0] = 0.0
        total += torch.tensor(row, dtype=torch.float64)
    return (total / num_tokens).softmax(dim=0)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "group_size 1"])
@pytest.mark.parametrize("threshold, weight", [(0.5, 0.1), (0.9, 0.6), (-0.2, 0.0)])
def test_scores_equal_the_definition(name, threshold, weight):
    window = WINDOWS[name]
    importance = SnapKV(num_observed=3, kernel_size=5).score(window).double()

    def score(b, h):
        return weight * importance[b, h] - (1 - weight) * redundancy_by_loops(window.keys[b, :, h], threshold)

    method = RKV(importance_weight=weight, similarity_threshold=threshold, num_observed=3, kernel_size=5)
    torch.testing.assert_close(method.score(window), per_head(window, score), rtol=1e-5, atol=1e-7)


def test_the_newest_of_similar_tokens_is_spared():
    window = random_window(batch=1, num_tokens=20, num_kv_heads=1, head_dim=32)
    window.keys[0, [3, 8, 15], 0] = window.keys[0, 3, 0].clone()
    redundant = redundancy(window.keys[0], 0.5)[0]
    # The rows of the two older ones spare the newest, the newest's own row spares the one before it.
    assert redundant[15] < redundant[8] < redundant[3]


def test_importance_alone_is_snapkv():
    window = WINDOWS["window"]
    kept = RKV(importance_weight=1.0).compress(window, 9).indices
    assert torch.equal(kept, SnapKV().compress(window, 9).indices)


def test_refusals():
    with pytest.raises(ValueError, match=r"importance_weight=1.5: must be a number in \[0, 1\]"):
        RKV(importance_weight=1.5)
    with pytest.raises(ValueError, match="similarity_threshold='0.5'"):
        RKV(similarity_threshold="0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel_size=6: must be odd"):
        RKV(kernel_size=6)
