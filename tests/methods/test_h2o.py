from __future__ import annotations

import pytest
import torch

from kvllm.methods.h2o import H2O
from tests.methods.loops import group_size, per_head, weights
from tests.methods.test_all_methods import WINDOWS


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "some queries before the window"])
@pytest.mark.parametrize("average", [False, True])
def test_scores_equal_the_definition(name, average):
    window = WINDOWS[name]

    def score(b, h):
        total = torch.zeros(window.num_tokens, dtype=torch.float64)
        queries = torch.zeros(window.num_tokens, dtype=torch.float64)
        for q in range(window.queries.shape[1]):
            rows = [weights(window, b, h, g, q) for g in range(group_size(window))]
            total += torch.stack(rows).mean(dim=0)
            queries += sum((row > 0).double() for row in rows) / len(rows)
        return total / torch.where(queries > 0, queries, 1) if average else total

    torch.testing.assert_close(H2O(average=average).score(window), per_head(window, score), rtol=1e-5, atol=1e-7)


def test_a_query_before_the_window_sees_nothing():
    window = WINDOWS["some queries before the window"]
    total = H2O().score(window).sum(dim=-1)
    torch.testing.assert_close(total, torch.full_like(total, 3.0))  # five queries, two of them before it


def test_average_must_be_a_flag():
    with pytest.raises(ValueError, match="average='false': must be true or false"):
        H2O(average="false")  # type: ignore[arg-type]
