"""Find layer budgets for a model: a ratio for each group of layers, with a given mean.

    kvllm eval calibrate-layers --traces traces.jsonl --model DIR --half train --out table.json

Rule `kl` moves budget between groups of layers as long as this lowers the KL from the full cache on the traces. Rule
`cake` distributes it by the layers' preferences (`kvllm.methods.cake`), `pyramid` as `pyramidkv` does.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvllm.budgets import Budget, equal_groups, mean_ratio, most_groups, table_of
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.groups import full_layers
from kvllm.measure.environment import environment
from kvllm.measure.eval.fidelity import Result, measure
from kvllm.measure.eval.problems import half_of
from kvllm.measure.eval.report import Progress, interval, markdown
from kvllm.measure.eval.sweep import Case
from kvllm.measure.eval.traces import Trace, read_traces
from kvllm.methods import checked_config, resolved
from kvllm.methods.base import Kept, Method, Window
from kvllm.methods.cake import preferences
from kvllm.methods.pyramidkv import PyramidKV
from kvllm.reference import Request, block_size_of, feed, load_model
from kvllm.reference.request import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNIFORM = "one ratio"
Budgets = tuple[Budget, ...]
# Returns the KL of each table on the traces; empty budgets: one ratio for all layers.
Measure = Callable[[Sequence[Budgets]], list[Result]]


@dataclass(frozen=True)
class Bounds:
    """The smallest and largest ratio of a group of layers: a window keeps at least one block but not all."""

    low: float
    high: float

    @classmethod
    def of(cls, config: KvConfig, block_size: int) -> Bounds:
        return cls(block_size / config.window_size, 0.99)


def measured_by_kl(model: PreTrainedModel, traces: Sequence[Trace], config: KvConfig, block_size: int) -> Measure:
    def run(tables: Sequence[Budgets]) -> list[Result]:
        cases = [Case(name_of(table), with_table(config, table)) for table in tables]
        return measure(model, traces, cases, block_size, Progress("replays"))

    return run


def with_table(config: KvConfig, budgets: Budgets) -> KvConfig:
    return replace(config, retention_ratio=table_of(budgets)) if budgets else config


def name_of(budgets: Budgets) -> str:
    return ", ".join(f"{budget.key}: {budget.ratio:g}" for budget in budgets) or UNIFORM


def moves(budgets: Budgets, step: float, bounds: Bounds) -> list[Budgets]:
    """All tables in which one group has `step` more and another `step` less, within the bounds."""
    made = []
    for gains, loses in itertools.permutations(range(len(budgets)), 2):
        ratios = [budget.ratio for budget in budgets]
        ratios[gains], ratios[loses] = round(ratios[gains] + step, 4), round(ratios[loses] - step, 4)
        if bounds.low <= ratios[loses] and ratios[gains] <= bounds.high:
            made.append(tuple(Budget(b.layers, r) for b, r in zip(budgets, ratios, strict=True)))
    return made


def descend(
    groups: Sequence[tuple[int, ...]], config: KvConfig, bounds: Bounds, steps: Sequence[float], run: Measure
) -> tuple[Budgets, list[Result]]:
    """Greedy search for the table with the lowest KL, starting from one ratio for all; also returns all measurements.

    Each round makes the best move if it lowers the KL, else continues with the next smaller step.
    """
    best: Budgets = tuple(Budget(group, config.mean_ratio) for group in groups)
    (uniform,) = run([()])
    lowest, seen = uniform.estimate("kl").value, [uniform]
    known: set[Budgets] = {best}
    for step in steps:
        while tables := [table for table in moves(best, step, bounds) if table not in known]:
            known.update(tables)
            results = run(tables)
            seen += results
            values = [result.estimate("kl").value for result in results]
            if min(values) >= lowest:
                break
            lowest = min(values)
            best = tables[values.index(lowest)]
    return best, seen


def by_preference(
    groups: Sequence[tuple[int, ...]], preference: dict[int, float], mean: float, bounds: Bounds
) -> Budgets:
    """Budgets in proportion to the mean preference of each group's layers; excess over a bound goes to other groups.

    preference: by the layer's number
    """
    weights = [sum(preference[layer] for layer in group) / len(group) for group in groups]
    ratios: dict[int, float] = {}
    while len(ratios) < len(groups):
        free = [i for i in range(len(groups)) if i not in ratios]
        left = mean * len(groups) - sum(ratios.values())
        shares = {i: left * weights[i] / sum(weights[j] for j in free) for i in free}
        outside = {i: min(max(share, bounds.low), bounds.high) for i, share in shares.items()}
        cut = {i: share for i, share in outside.items() if share != shares[i]}
        ratios |= cut or shares
    rounded = [round(ratios[i], 4) for i in range(len(groups))]
    widest = rounded.index(max(rounded))
    rounded[widest] = round(rounded[widest] + mean * len(groups) - sum(rounded), 10)  # makes the mean exact
    return tuple(Budget(group, ratio) for group, ratio in zip(groups, rounded, strict=True))


class Observer(Method):
    """The method, which also records the preference of every layer at every event."""

    def __init__(self, method: Method, num_observed: int) -> None:
        self.method, self.num_observed = method, num_observed
        self.seen: list[tuple[Tensor, Tensor]] = []

    def score(self, window: Window) -> Tensor:
        return self.method.score(window)

    def compress(self, window: Window, num_kept: int) -> Kept:
        self.seen.append((window.layers.cpu(), preferences(window, self.num_observed).cpu()))
        return self.method.compress(window, num_kept)


def observed_preferences(
    model: PreTrainedModel, traces: Sequence[Trace], config: KvConfig, block_size: int, num_observed: int = 32
) -> dict[int, float]:
    """The mean preference of each layer over all events of the traces, by its number."""
    total: dict[int, list[float]] = {}
    progress = Progress("traces")
    progress(0, len(traces))
    for done, trace in enumerate(traces, start=1):
        request = Request(model, trace.num_prompt_tokens, config, block_size)
        observer = request.method = Observer(request.method, num_observed)
        feed(request, trace.token_ids)
        for layers, values in observer.seen:
            for layer, value in zip(layers.tolist(), values.tolist(), strict=True):
                total.setdefault(layer, []).append(value)
        progress(done, len(traces))
    if not total:
        raise UsageError("no trace is long enough to be compressed; use longer traces.")
    return {layer: sum(values) / len(values) for layer, values in total.items()}


def table(results: Sequence[Result]) -> str:
    """Markdown: each table of budgets, its KL, and its KL relative to one ratio for all layers."""
    uniform = next(result for result in results if result.case.name == UNIFORM)
    rows = [
        [result.case.name, interval(result.estimate("kl"), 4), interval(result.against(uniform), 2)]
        for result in sorted(results, key=lambda result: result.estimate("kl").value)
    ]
    return markdown(["layers: ratio", "KL", "/ one ratio's"], rows)


def run(
    traces_path: Path,
    folder: str,
    out: Path,
    rule: str,
    options: dict[str, Any],
    num_groups: int | None,
    steps: Sequence[float],
    half: str | None,
    limit: int | None,
    block_size: int,
    device: str,
    dtype: str,
) -> None:
    """Write the table, a value for `retention_ratio`, to `out`, and print the measurements."""
    config = checked_config(options)
    if config.budgets or not config.enabled:
        raise UsageError(f"retention_ratio={config.retention_ratio}: give the table's mean, a number below 1.")
    traces = half_of(read_traces(traces_path), half)[:limit]
    model, start = load_model(folder, getattr(torch, dtype), device), time.perf_counter()
    block_size = block_size_of(model, block_size)
    layers = full_layers(layers_of(model))
    groups = equal_groups(layers, num_groups or most_groups(len(layers)))
    bounds, measured = Bounds.of(config, block_size), measured_by_kl(model, traces, config, block_size)
    if rule == "kl":
        found, results = descend(groups, config, bounds, steps, measured)
    else:
        if rule == "cake":
            preference = observed_preferences(model, traces, config, block_size)
        else:
            pyramid = PyramidKV(num_groups=len(groups)).layer_budgets(config.mean_ratio, layers)
            preference = {layer: budget.ratio for budget in pyramid for layer in budget.layers}
        found = by_preference(groups, preference, config.mean_ratio, bounds)
        results = measured([(), found])
    out.write_text(json.dumps(table_of(found)) + "\n")
    print(table(results))
    print(f"\n{out}: {json.dumps(table_of(found))}, {mean_ratio(found):g} on average")
    about = {"model": Path(folder).name, "traces": traces_path.name, "half": half, "num_traces": len(traces)}
    seconds = {"seconds": time.perf_counter() - start, "block_size": block_size, "dtype": dtype}
    figures = [{"name": r.case.name, "kl": asdict(r.estimate("kl"))} for r in results]
    report = {"task": "calibrate-layers", "rule": rule, **environment(), **about, **seconds}
    report |= {"config": resolved(config), "table": table_of(found), "results": figures}
    out.with_suffix(".report.json").write_text(json.dumps(report, indent=1) + "\n")
