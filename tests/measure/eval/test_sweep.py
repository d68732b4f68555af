from __future__ import annotations

import pytest

from kvllm.config import KvConfig
from kvllm.measure.eval.sweep import BASELINES, SWEEPS, cases, combinations, parse_cases


def test_lists_are_multiplied_also_inside_mappings():
    entry = {"a": 1, "b": [2, 3], "c": {"d": [4, 5]}}
    assert list(combinations(entry)) == [
        {"a": 1, "b": 2, "c": {"d": 4}},
        {"a": 1, "b": 2, "c": {"d": 5}},
        {"a": 1, "b": 3, "c": {"d": 4}},
        {"a": 1, "b": 3, "c": {"d": 5}},
    ]


def test_baselines_are_added_once_a_ratio_and_size():
    made = cases(
        [
            {"method": ["kara", "random"], "query_stride": [4, 8]},
            {"method": "kara", "name": "wide", "window_size": 512},
        ],
        {"retention_ratio": [0.2, 0.5]},
    )
    assert sorted(c.label for c in made) == sorted(
        f"{name} r={ratio}"
        for name in ("kara", "kara query_stride=8", "wide", *BASELINES, *(f"{b} window_size=512" for b in BASELINES))
        for ratio in (0.2, 0.5)
    )


def test_a_ratio_of_one_has_no_baseline():
    assert [c.label for c in cases([{"retention_ratio": 1.0}])] == ["kara r=1"]


def test_from_the_command_line(tmp_path):
    path = tmp_path / "sweep.json"
    path.write_text('[{"method": "kara", "method_options": {"chunk_fill": [0, 0.25]}}]')
    made = parse_cases([str(path), '{"method": "tova"}'], "snapkv", "0.3,0.5", {"window_size": 128})
    assert [c.label for c in made[:4]] == [
        "kara chunk_fill=0 r=0.3", "kara chunk_fill=0.25 r=0.3",
        "kara chunk_fill=0 r=0.5", "kara chunk_fill=0.25 r=0.5",
    ]  # fmt: skip
    assert made[4].config == KvConfig(method="tova", window_size=128, retention_ratio=0.3)
    assert [c.name for c in made[6:]] == ["snapkv", "snapkv", "random", "recent", "random", "recent"]
    with pytest.raises(ValueError, match="nothing to measure"):
        parse_cases([], None, "0.3")
    with pytest.raises(ValueError, match="not valid JSON"):
        parse_cases(["{"], None, None)


def test_what_ships_names_known_methods_and_options():
    for path in SWEEPS.glob("*.json"):
        made = parse_cases([path.stem], None, "0.3")
        assert len(made) == len({case.label for case in made}) > 10


def test_the_baseline_of_layer_budgets_has_their_mean_for_all_layers():
    entries = [{"method": "kara", "retention_ratio": [{"0": 0.5, "1": 0.1}, {"0": 0.4, "1": 0.2}]}]
    found = cases(entries, baselines=("random",))
    assert [case.label for case in found] == ["kara 0:0.5 1:0.1 r=0.3", "kara 0:0.4 1:0.2 r=0.3", "random r=0.3"]
    assert found[2].config.retention_ratio == 0.3
