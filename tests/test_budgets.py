"""Tables of layer budgets: what they say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvllm.budgets import Budget, check_layers, equal_groups, mean_ratio, most_groups, parse_table, table_of
from kvllm.config import KvConfig
from kvllm.groups import Groups, groups_of
from kvllm.layers import Local

TABLE = {"0-2,6": 0.5, "3-5, 7": 0.1}


def test_a_table_and_back() -> None:
    budgets = parse_table(TABLE)
    assert budgets == (Budget((0, 1, 2, 6), 0.5), Budget((3, 4, 5, 7), 0.1))
    assert table_of(budgets) == {"0-2,6": 0.5, "3-5,7": 0.1}
    assert mean_ratio(budgets) == 0.3


def test_a_configuration_stands_for_one_of_each_group() -> None:
    config = KvConfig(retention_ratio=TABLE, method="snapkv", request_ratios="1.0")
    assert [part.retention_ratio for part in config.parts] == [0.5, 0.1]
    assert {part.method for part in config.parts} == {"snapkv"}
    assert (config.mean_ratio, config.enabled, config.all_ratios) == (0.3, True, [0.3, 1.0])
    assert KvConfig.from_dict(config.to_dict()) == config
    plain = KvConfig(retention_ratio=0.3)
    assert plain.parts == (plain,) and plain.mean_ratio == 0.3 and not plain.budgets


@pytest.mark.parametrize(
    "table, message",
    [
        ({"0-3": 0.5}, "has 1 groups of layers; use 2 to 4, or one ratio for all layers"),
        ({str(i): 0.5 for i in range(5)}, "has 5 groups of layers; use 2 to 4"),
        ({"0-1": 0.5, "1-2": 0.5}, "layer 1 has two ratios; name each layer once"),
        ({"0,0": 0.5, "1-2": 0.5}, "layer 0 has two ratios"),
        ({"0-1": 0.5, "2": 0.5}, "its groups have 2, 1 layers, .* use groups of equal size"),
        ({"0-1": 0.5, "3-2": 0.5}, "'3-2' does not name layers; write numbers and ranges such as '0-13' or '0-3,8'"),
        ({"0": 0.5, "all": 0.5}, "'all' does not name layers"),
        ({"0": 0.5, "1": 1.0}, "the ratio of layers 1 is 1.0; use a number above 0 and below 1"),
        ({"0": 0.5, "1": True}, "the ratio of layers 1 is True"),
        ({"0": 0.5, "1": "0.5"}, "the ratio of layers 1 is '0.5'"),
        ([0.5], "must be a number in .* or a mapping of names to values, not a list"),
    ],
)
def test_invalid_tables_are_refused(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^retention_ratio=.*{message}"):
        KvConfig(retention_ratio=table)


def test_options_that_do_not_go_with_a_table() -> None:
    with pytest.raises(ValueError, match=r"only for policy=window; with policy=budget every layer keeps budget_size="):
        KvConfig(retention_ratio=TABLE, policy="budget")
    with pytest.raises(
        ValueError, match=r"request_ratios='1.0,0.2-0.5': .* applies to all layers, so 0.2 contradicts ret"
    ):
        KvConfig(retention_ratio=TABLE, request_ratios="1.0,0.2-0.5")


def test_a_table_names_the_model_s_layers_of_full_attention_and_no_others() -> None:
    budgets = parse_table({"1": 0.5, "3": 0.1})
    check_layers(budgets, [1, 3])
    with pytest.raises(ValueError, match="layers 5 have no ratio; the model's full-attention layers are 1,3,5"):
        check_layers(budgets, [1, 3, 5])
    with pytest.raises(ValueError, match="layers 3 are not among the model's full-attention layers, which are 1-2"):
        check_layers(parse_table({"1-2": 0.5, "3-4": 0.1}), [1, 2, 4])


def test_kv_cache_groups() -> None:
    full: list[Local | None] = [None] * 8
    assert groups_of(full, parse_table(TABLE)) == Groups(4, 2)
    assert groups_of(full, ()) == Groups(8)
    window = Local(128)
    mixed = [window, None] * 4
    assert groups_of(mixed, parse_table({"1,3": 0.5, "5,7": 0.1})) == Groups(2, 2, 2, window)
    with pytest.raises(ValueError, match="1 local layers, vLLM would split these 2 groups into 4 KV cache groups"):
        groups_of([window, None, None, None, None], parse_table({"1-2": 0.5, "3-4": 0.1}))


def test_equal_groups() -> None:
    assert equal_groups(range(6), 3) == [(0, 1), (2, 3), (4, 5)]
    assert [most_groups(n) for n in (28, 30, 26, 29)] == [4, 3, 2, 1]
    with pytest.raises(ValueError, match="num_groups=4: 30 .*layers must be divided into 2 to 4 groups .*; use 2 or 3"):
        equal_groups(range(30), 4)
    with pytest.raises(ValueError, match="layer budgets are not possible for this model"):
        equal_groups(range(29), 2)
