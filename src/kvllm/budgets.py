"""Layer budgets: a table in `retention_ratio` gives each group of layers its own ratio.

    {"0-13": 0.4, "14-27": 0.2}    the first 14 layers keep 40%, the others 20%: 30% on average

Each group becomes a KV cache group in vLLM, and all of them allocate from one block pool. Blocks have the same size in
all groups only if the groups have the same number of layers, so unequal groups are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvllm.errors import UsageError

FEWEST, MOST = 2, 4  # groups
_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


@dataclass(frozen=True)
class Budget:
    """One group of layers (their indices in the model) and the share of a window that each of them keeps."""

    layers: tuple[int, ...]
    ratio: float

    @property
    def key(self) -> str:
        """The layers as a key of the table, such as "0-3,8"."""
        ranges: list[list[int]] = []
        for layer in self.layers:
            if ranges and layer == ranges[-1][1] + 1:
                ranges[-1][1] = layer
            else:
                ranges.append([layer, layer])
        return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)


def parse_table(table: Mapping[str, Any]) -> tuple[Budget, ...]:
    """Parse a table of ratios; an invalid one raises UsageError with the table, the fault and the remedy."""
    if not FEWEST <= len(table) <= MOST:
        raise _wrong(table, f"has {len(table)} groups of layers; use {FEWEST} to {MOST}, or one ratio for all layers")
    budgets = tuple(Budget(_parse_layers(table, key), _parse_ratio(table, key, ratio)) for key, ratio in table.items())
    every = sorted(layer for budget in budgets for layer in budget.layers)
    if twice := [a for a, b in zip(every, every[1:], strict=False) if a == b]:
        raise _wrong(table, f"layer {twice[0]} has two ratios; name each layer once")
    sizes = [len(budget.layers) for budget in budgets]
    if len(set(sizes)) > 1:
        raise _wrong(
            table,
            f"its groups have {', '.join(map(str, sizes))} layers, but all must have the same number, since they share "
            "one block pool; use groups of equal size (two of them may have the same ratio)",
        )
    return budgets


def table_of(budgets: Sequence[Budget]) -> dict[str, float]:
    """The table of these budgets: the inverse of `parse_table`."""
    return {budget.key: budget.ratio for budget in budgets}


def mean_ratio(budgets: Sequence[Budget]) -> float:
    """Share of a window that survives, averaged over all layers (the groups have equal size)."""
    return round(sum(budget.ratio for budget in budgets) / len(budgets), 10)


def check_layers(budgets: Sequence[Budget], layers: Sequence[int]) -> None:
    """Raise UsageError unless the table covers exactly the model's full-attention layers.

    layers: indices of the full-attention layers
    """
    named = {layer for budget in budgets for layer in budget.layers}
    table, every = table_of(budgets), Budget(tuple(layers), 1.0).key
    if missing := sorted(set(layers) - named):
        raise _wrong(
            table, f"layers {Budget(tuple(missing), 1.0).key} have no ratio; the model's full-attention layers are "
            f"{every}",
        )  # fmt: skip
    if others := sorted(named - set(layers)):
        raise _wrong(
            table, f"layers {Budget(tuple(others), 1.0).key} are not among the model's full-attention layers, which "
            f"are {every}",
        )  # fmt: skip


def equal_groups(layers: Sequence[int], num_groups: int) -> list[tuple[int, ...]]:
    """Divide the layers into `num_groups` equal groups of consecutive layers; UsageError if that is impossible."""
    if not FEWEST <= num_groups <= MOST or len(layers) % num_groups:
        fitting = [n for n in range(FEWEST, MOST + 1) if len(layers) % n == 0]
        remedy = f"use {' or '.join(map(str, fitting))}" if fitting else "layer budgets are not possible for this model"
        raise UsageError(
            f"num_groups={num_groups}: {len(layers)} full-attention layers must be divided into {FEWEST} to {MOST} "
            f"groups of equal size; {remedy}."
        )
    size = len(layers) // num_groups
    return [tuple(layers[i : i + size]) for i in range(0, len(layers), size)]


def most_groups(num_layers: int) -> int:
    """The largest allowed number of equal groups; 1 if the layers cannot be divided."""
    return max((n for n in range(FEWEST, MOST + 1) if num_layers % n == 0), default=1)


def _parse_layers(table: Mapping[str, Any], key: str) -> tuple[int, ...]:
    layers: list[int] = []
    for item in key.split(","):
        match = _RANGE.fullmatch(item)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise _wrong(table, f"{key!r} does not name layers; write numbers and ranges such as '0-13' or '0-3,8'")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(sorted(layers))


def _parse_ratio(table: Mapping[str, Any], key: str, ratio: Any) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise _wrong(table, f"the ratio of layers {key} is {ratio!r}; use a number above 0 and below 1")
    return float(ratio)


def _wrong(table: Mapping[str, Any], why: str) -> UsageError:
    return UsageError(f"retention_ratio={dict(table)}: {why}.")
