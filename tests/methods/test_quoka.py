from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from kvllm.methods.quoka import QuoKA
from tests.methods.loops import group_size, per_head
from tests.methods.test_all_methods import WINDOWS
from tests.methods.windows import random_window


def cosine(a, b) -> float:
    return float(cosine_similarity(a.double(), b.double(), dim=0))


def scores_by_loops(window, count, over_queries):
    def score(b, h):
        total = torch.zeros(window.num_tokens, dtype=torch.float64)
        for g in range(group_size(window)):
            queries = list(window.queries[b, :, h * group_size(window) + g])
            mean = sum(q.double() for q in queries) / len(queries)
            unusual = sorted(queries, key=lambda q: cosine(q, mean))[:count]
            for t in range(window.num_tokens):
                cosines = [cosine(q, window.keys[b, t, h]) for q in unusual]
                total[t] += max(cosines) if over_queries == "max" else sum(cosines) / len(cosines)
        return total / group_size(window)

    return per_head(window, score)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "group_size 1"])
@pytest.mark.parametrize("count, over_queries", [(2, "max"), (3, "mean"), (16, "max")])
def test_scores_equal_the_definition(name, count, over_queries):
    window = WINDOWS[name]
    method = QuoKA(num_observed=count, over_queries=over_queries)
    torch.testing.assert_close(method.score(window), scores_by_loops(window, count, over_queries), rtol=1e-5, atol=1e-6)


def test_one_unusual_query_saves_its_key():
    window = random_window(batch=1, num_kv_heads=1, group_size=1)
    window.queries[...] = torch.eye(8)[0]
    window.queries[0, 3, 0] = torch.eye(8)[5]
    window.keys[...] = torch.eye(8)[0]
    window.keys[0, 11, 0] = torch.eye(8)[5]
    assert QuoKA(num_observed=1).compress(window, 1).indices.tolist() == [[[11]]]
