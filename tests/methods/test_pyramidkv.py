from __future__ import annotations

import pytest
import torch

from kvllm.budgets import mean_ratio
from kvllm.config import KvConfig
from kvllm.methods import with_budgets
from kvllm.methods.pyramidkv import PyramidKV
from kvllm.methods.snapkv import SnapKV
from tests.methods.windows import random_window


def test_scores_are_snapkv_s():
    window = random_window()
    assert torch.equal(PyramidKV(num_observed=3).score(window), SnapKV(num_observed=3).score(window))


@pytest.mark.parametrize("num_layers, num_groups", [(28, 4), (28, 2), (30, 3), (4, 4)])
@pytest.mark.parametrize("beta", [1.0, 4.0, 20.0])
def test_a_group_has_the_mean_of_its_layers_budgets(num_layers, num_groups, beta):
    """The paper's straight line from 2 r - r / beta in the lowest layer to r / beta in the highest, layer by layer."""
    low, high = 0.3 / beta, 0.6 - 0.3 / beta
    line = [high - layer * (high - low) / (num_layers - 1) for layer in range(num_layers)]
    budgets = PyramidKV(beta=beta, num_groups=num_groups).layer_budgets(0.3, range(num_layers))
    size = num_layers // num_groups
    for number, budget in enumerate(budgets):
        assert budget.layers == tuple(range(number * size, (number + 1) * size))
        assert budget.ratio == pytest.approx(sum(line[number * size : (number + 1) * size]) / size, abs=1e-4)
    assert mean_ratio(budgets) == pytest.approx(0.3, abs=1e-4)


def test_a_configuration_gets_the_table_of_its_model():
    config = KvConfig(method="pyramidkv", retention_ratio=0.3)
    assert with_budgets(config, range(1, 8, 2)).retention_ratio == {"1": 0.585, "3": 0.395, "5": 0.205, "7": 0.015}
    table = KvConfig(method="pyramidkv", retention_ratio={"0": 0.4, "1": 0.2})
    assert with_budgets(table, range(2)) is table
    assert with_budgets(KvConfig(method="pyramidkv", retention_ratio=1.0), range(4)).retention_ratio == 1.0
    assert with_budgets(KvConfig(), range(4)) == KvConfig()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"beta=20.0: .* of 0.6, the lowest layers would keep 1\."):
        PyramidKV().layer_budgets(0.6, range(28))
    with pytest.raises(ValueError, match="num_groups=4: 30 full-attention layers must be divided"):
        PyramidKV(num_groups=4).layer_budgets(0.3, range(30))
    with pytest.raises(ValueError, match="beta=0.5: must be a number >= 1"):
        PyramidKV(beta=0.5)
    for method, others in (("kara", "random,pyramidkv"), ("pyramidkv", "kara")):
        with pytest.raises(ValueError, match=f"request_methods='{others}': cannot be combined with pyramidkv, because"):
            with_budgets(KvConfig(method=method, request_methods=others), range(4))
    table = KvConfig(method="kara", request_methods="pyramidkv", retention_ratio={"0": 0.4, "1": 0.2})
    assert with_budgets(table, range(2)) is table  # given by the operator, and so for all methods
