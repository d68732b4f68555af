"""Summarise answers to chains: problems solved and recalled, compared with the full cache and random eviction."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvllm.measure.eval.chain_score import ChainScore, score
from kvllm.measure.eval.report import interval, markdown
from kvllm.measure.eval.samples import Sample
from kvllm.measure.eval.stats import Estimate, bootstrap_mean
from kvllm.measure.eval.sweep import FULL

PARTS = 4  # of a chain, for accuracy by position
DISTANCES = (
    0,
    512,
    1024,
    2048,
    4096,
    8192,
)  # lower bounds of the bins of recall by distance, in tokens; the last is open


@dataclass(frozen=True)
class Bin:
    """One bin over all chains. first: lower bound of the bin, a position in the chain or a distance in tokens"""

    first: int
    share: float
    count: int


@dataclass(frozen=True)
class ChainSummary:
    """Results of one configuration.

    accuracy:           share of a chain's problems that are solved, mean over chains
    recall:             share of the answer's own results that the final list repeats
    *_less_full:        paired difference from the full cache; *_less_random: from random eviction of the same size
    finished:           share of chains with a result and an entry in the list for every problem
    by_position:        share solved, by position in the chain; by_distance: share recalled, by tokens in between
    """

    name: str
    ratio: float | None
    config: Mapping[str, Any] | None
    num_chains: int
    num_samples: int
    accuracy: Estimate
    recall: Estimate
    finished: Estimate
    mean_tokens: Estimate
    accuracy_less_full: Estimate | None
    recall_less_full: Estimate | None
    accuracy_less_random: Estimate | None
    recall_less_random: Estimate | None
    by_position: list[Bin]
    by_distance: list[Bin]


Scored = list[tuple[Sample, ChainScore]]
Group = tuple[str, float | None, str]


def summarise(samples: Sequence[Sample]) -> list[ChainSummary]:
    """Results by configuration, in the order of the log, the full cache first."""
    groups: dict[Group, Scored] = {}
    for s in samples:
        key = (s.name, s.ratio, json.dumps(s.config, sort_keys=True))
        groups.setdefault(key, []).append((s, score(s, json.loads(s.expected))))
    full = next((scored for (name, _, _), scored in groups.items() if name == FULL), None)
    made = [_summary(scored, full, _random_like(key, groups)) for key, scored in groups.items()]
    return sorted(made, key=lambda summary: summary.name != FULL)


def _random_like(key: Group, groups: Mapping[Group, Scored]) -> Scored | None:
    """The random baseline with the same ratio and sizes; None for a random configuration."""
    mine = _sizes(key)
    if mine is None or mine["method"] == "random":
        return None
    wanted = {**mine, "method": "random"}
    return next((scored for other, scored in groups.items() if _sizes(other) == wanted), None)


def _sizes(key: Group) -> dict[str, Any] | None:
    """Method, ratio and the options that determine the cache size; None if KvLLM compresses nothing."""
    config = json.loads(key[2]) or {}
    if "method" not in config:
        return None
    names = ("method", "policy", "window_size", "buffer_size", "budget_size", "survivor_bits", "history_size")
    return {"ratio": key[1], **{name: config[name] for name in names}}


def _summary(scored: Scored, full: Scored | None, random: Scored | None) -> ChainSummary:
    sample = scored[0][0]
    others = {"full": None if full is scored else full, "random": random}
    less = {
        f"{name}_less_{other}": _difference(scored, them, name) if them else None
        for name in ("accuracy", "recall")
        for other, them in others.items()
    }
    return ChainSummary(
        name=sample.name,
        ratio=sample.ratio,
        config=sample.config,
        num_chains=len({s.problem_id for s, _ in scored}),
        num_samples=len(scored),
        accuracy=bootstrap_mean(list(_by_chain(scored, lambda s, c: c.accuracy).values())),
        recall=bootstrap_mean(list(_by_chain(scored, lambda s, c: c.recall).values())),
        finished=bootstrap_mean(list(_by_chain(scored, lambda s, c: float(c.finished)).values())),
        mean_tokens=bootstrap_mean(list(_by_chain(scored, lambda s, c: float(s.num_tokens)).values())),
        **less,
        by_position=_by_position(scored),
        by_distance=_by_distance(scored),
    )


def _by_chain(scored: Scored, figure: Callable[[Sample, ChainScore], float]) -> dict[str, float]:
    """Mean over each chain's samples, which are not independent."""
    values: dict[str, list[float]] = {}
    for sample, made in scored:
        values.setdefault(sample.problem_id, []).append(figure(sample, made))
    return {chain: float(np.mean(v)) for chain, v in values.items()}


def _difference(scored: Scored, others: Scored, name: str) -> Estimate | None:
    mine, theirs = (_by_chain(each, lambda s, c: getattr(c, name)) for each in (scored, others))
    both = [chain for chain in mine if chain in theirs]
    return bootstrap_mean([mine[chain] - theirs[chain] for chain in both]) if both else None


def _by_position(scored: Scored) -> list[Bin]:
    """Share solved in each part of the chain; `first` counts problems from 1."""
    length = len(scored[0][1].correct)
    starts = sorted({length * part // PARTS for part in range(PARTS)})
    bins = []
    for start, end in zip(starts, (*starts[1:], length), strict=True):
        solved = [solved for _, made in scored for solved in made.correct[start:end]]
        bins.append(Bin(start + 1, float(np.mean(solved)), len(solved)))
    return bins


def _by_distance(scored: Scored) -> list[Bin]:
    bins = []
    for low, high in zip(DISTANCES, (*DISTANCES[1:], np.inf), strict=True):
        inside = [
            bool(recalled)
            for _, made in scored
            for recalled, distance in zip(made.recalled, made.distance, strict=True)
            if distance is not None and low <= distance < high
        ]
        if inside:
            bins.append(Bin(low, float(np.mean(inside)), len(inside)))
    return bins


def table(summaries: Sequence[ChainSummary]) -> str:
    """Markdown: results by configuration, then recall by distance and accuracy by position."""

    def percent(estimate: Estimate | None) -> str:
        return interval(estimate, 1, scale=100) if estimate else ""

    header = ["configuration", "ratio", "chains", "solved %", "less full's", "less random's", "recalled %"]
    header += ["less full's", "less random's", "finished %", "mean tokens"]
    rows = [
        [
            s.name,
            "" if s.ratio is None else f"{s.ratio:g}",
            f"{s.num_chains} x {s.num_samples / s.num_chains:g}",
            percent(s.accuracy),
            percent(s.accuracy_less_full),
            percent(s.accuracy_less_random),
            percent(s.recall),
            percent(s.recall_less_full),
            percent(s.recall_less_random),
            f"{100 * s.finished.value:.0f}",
            f"{s.mean_tokens.value:.0f}",
        ]
        for s in summaries
    ]
    binned = [("recalled %, tokens in between", "by_distance"), ("solved %, position in the chain", "by_position")]
    more = [_binned(summaries, title, name) for title, name in binned if any(getattr(s, name) for s in summaries)]
    return "\n\n".join([markdown(header, rows), *more])


def _binned(summaries: Sequence[ChainSummary], title: str, name: str) -> str:
    firsts = sorted({each.first for s in summaries for each in getattr(s, name)})
    rows = []
    for s in summaries:
        shares = {each.first: f"{100 * each.share:.0f} ({each.count})" for each in getattr(s, name)}
        rows.append([label(s), *(shares.get(first, "") for first in firsts)])
    return markdown([title, *(f"from {first}" for first in firsts)], rows)


def label(summary: ChainSummary) -> str:
    """A short label of the configuration that is unique for its ratio."""
    compressed = summary.ratio is not None and summary.ratio < 1
    return f"{summary.name} r={summary.ratio:g}" if compressed else summary.name
