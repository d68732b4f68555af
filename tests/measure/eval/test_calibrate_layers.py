"""Tables of layer budgets: how they are searched for, and the command on a tiny model."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from kvllm.budgets import Budget, mean_ratio
from kvllm.config import KvConfig
from kvllm.measure.eval.calibrate_layers import Bounds, by_preference, descend, moves, name_of, run
from kvllm.measure.eval.traces import Trace, write_traces
from tests.reference.models import text, tiny_model

GROUPS = [(0, 1), (2, 3), (4, 5)]
BOUNDS = Bounds(0.1, 0.9)


def table(*ratios: float) -> tuple[Budget, ...]:
    return tuple(Budget(group, ratio) for group, ratio in zip(GROUPS, ratios, strict=True))


def test_moves_keep_the_mean_and_the_bounds() -> None:
    made = moves(table(0.3, 0.3, 0.3), 0.2, BOUNDS)
    assert len(set(made)) == 6 and {mean_ratio(budgets) for budgets in made} == {0.3}
    assert table(0.5, 0.1, 0.3) in made
    assert moves(table(0.15, 0.3, 0.3), 0.15, BOUNDS) == [
        table(0.3, 0.15, 0.3), table(0.3, 0.3, 0.15), table(0.15, 0.45, 0.15), table(0.15, 0.15, 0.45),
    ]  # fmt: skip


def test_the_search_follows_the_kl() -> None:
    """Towards the table from which the made-up KL grows, with fewer measurements than there are tables."""
    seen: list[Any] = []

    def measure(tables: Any) -> list[Any]:
        seen.extend(tables)
        goal = (0.55, 0.25, 0.1)
        kls = [sum(abs(b.ratio - g) for b, g in zip(t or table(0.3, 0.3, 0.3), goal, strict=True)) for t in tables]
        return [SimpleNamespace(estimate=lambda name, kl=kl: SimpleNamespace(value=kl)) for kl in kls]

    best, results = descend(GROUPS, KvConfig(retention_ratio=0.3), BOUNDS, (0.1, 0.05), measure)
    assert best == table(0.55, 0.25, 0.1)
    assert len(results) == len(seen) == len(set(seen)) < 40


def test_where_nothing_is_gained_the_ratio_stays() -> None:
    def measure(tables: Any) -> list[Any]:
        return [SimpleNamespace(estimate=lambda name, t=t: SimpleNamespace(value=1.0 if t else 0.5)) for t in tables]

    assert descend(GROUPS, KvConfig(retention_ratio=0.3), BOUNDS, (0.1,), measure)[0] == table(0.3, 0.3, 0.3)


def test_budgets_by_preference() -> None:
    even = by_preference(GROUPS, {0: 2, 1: 4, 2: 1, 3: 1, 4: 5, 5: 0}, 0.3, BOUNDS)
    assert [budget.ratio for budget in even] == pytest.approx([0.9 * 3 / 6.5, 0.9 / 6.5, 0.9 * 2.5 / 6.5], abs=2e-4)
    assert mean_ratio(even) == 0.3
    assert by_preference(GROUPS, dict(zip(range(6), (1, 1, 3, 3, 100, 100), strict=True)), 0.3, BOUNDS) == table(
        0.1, 0.1, 0.7
    )


@pytest.mark.parametrize("rule", ["kl", "cake", "pyramid"])
def test_the_command(rule: str, tmp_path: Any, capsys: Any) -> None:
    folder, traces, out = tmp_path / "model", tmp_path / "traces.jsonl", tmp_path / "table.json"
    tiny_model("llama").save_pretrained(folder)
    write_traces(traces, [Trace(str(seed), text(150, seed), 20) for seed in range(2)])
    options = {"window_size": 64, "buffer_size": 32, "retention_ratio": 0.5, "method": "snapkv"}
    run(traces, str(folder), out, rule, options, 2, [0.25], None, None, 16, "cpu", "float32")
    found = json.loads(out.read_text())
    assert list(found) == ["0", "1"] and sum(found.values()) == pytest.approx(1, abs=1e-3)
    KvConfig(retention_ratio=found)
    printed = capsys.readouterr().out
    assert "| one ratio " in printed and f"{out}: " in printed and "0.5 on average" in printed
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["table"] == found and report["rule"] == rule
    assert len(report["results"]) == (3 if rule == "kl" else 2)
    with pytest.raises(ValueError, match="give the table.s mean"):
        run(
            traces,
            str(folder),
            out,
            rule,
            options | {"retention_ratio": found},
            2,
            [0.25],
            None,
            None,
            16,
            "cpu",
            "float32",
        )


def test_names() -> None:
    assert name_of(()) == "one ratio" and name_of(table(0.5, 0.3, 0.1)) == "0-1: 0.5, 2-3: 0.3, 4-5: 0.1"
