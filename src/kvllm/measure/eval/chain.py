"""Long chains of thought: many problems in one answer, then all results from memory, over methods and cache types.

    kvllm eval chain MODEL --configs chain --half test --chains 24 --length 24 --out DIR [vLLM's flags]

Runs as `accuracy` does, with the same log. Intervals resample whole chains, in pairs where two configurations are
compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvllm.engine.arguments import check_plugin_is_loaded
from kvllm.measure.environment import environment
from kvllm.measure.eval.accuracy import LOG, RUN, Job, check_run, plan, run, starter
from kvllm.measure.eval.chain_score import SCORE_VERSION, ChainScore, score
from kvllm.measure.eval.chains import CHAIN_VERSION, Chain
from kvllm.measure.eval.engines import Sampling
from kvllm.measure.eval.report import Progress, interval, markdown
from kvllm.measure.eval.samples import Sample
from kvllm.measure.eval.stats import Estimate, bootstrap_mean
from kvllm.measure.eval.sweep import FULL, Case

TASK = "chain"
GRADER = f"chain score v{SCORE_VERSION}"
PARTS = 4  # of a chain, for accuracy by position
DISTANCES = (0, 512, 1024, 2048, 4096, 8192)  # lower ends of the bins of recall, in tokens; the last is open


@dataclass(frozen=True)
class Bin:
    """Results of all chains together. first: lower end of the bin, a position in the chain or a distance in tokens"""

    first: int
    share: float
    count: int


@dataclass(frozen=True)
class ChainSummary:
    """One configuration.

    accuracy:           share of a chain's problems that are solved, mean over chains; recall: of the results come to,
                        the share that the list at the end repeats
    *_less_full:        difference to the full cache, *_less_random: to random eviction of the same size, chain by chain
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
    """In the order of the log, the full cache first."""
    groups: dict[Group, Scored] = {}
    for s in samples:
        key = (s.name, s.ratio, json.dumps(s.config, sort_keys=True))
        groups.setdefault(key, []).append((s, score(s, json.loads(s.expected))))
    full = next((scored for (name, _, _), scored in groups.items() if name == FULL), None)
    made = [_summary(scored, full, _random_like(key, groups)) for key, scored in groups.items()]
    return sorted(made, key=lambda summary: summary.name != FULL)


def _random_like(key: Group, groups: Mapping[Group, Scored]) -> Scored | None:
    """The random baseline of the same ratio and sizes as a configuration that is not random itself."""
    mine = _sizes(key)
    if mine is None or mine["method"] == "random":
        return None
    wanted = {**mine, "method": "random"}
    return next((scored for other, scored in groups.items() if _sizes(other) == wanted), None)


def _sizes(key: Group) -> dict[str, Any] | None:
    """Method, ratio and what decides how much is kept and stored; None where nothing is compressed by us."""
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
    """The mean over a chain's samples, by chain: the samples of a chain are not independent."""
    values: dict[str, list[float]] = {}
    for sample, made in scored:
        values.setdefault(sample.problem_id, []).append(figure(sample, made))
    return {chain: float(np.mean(v)) for chain, v in values.items()}


def _difference(scored: Scored, others: Scored, name: str) -> Estimate | None:
    mine, theirs = (_by_chain(each, lambda s, c: getattr(c, name)) for each in (scored, others))
    both = [chain for chain in mine if chain in theirs]
    return bootstrap_mean([mine[chain] - theirs[chain] for chain in both]) if both else None


def _by_position(scored: Scored) -> list[Bin]:
    """Solved of each part of the chain; `first` counts problems from 1."""
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
    """Markdown: the figures of each configuration, then recall by distance and accuracy by position."""

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
    return "\n\n".join([markdown(header, rows), *(_binned(summaries, title, name) for title, name in binned)])


def _binned(summaries: Sequence[ChainSummary], title: str, name: str) -> str:
    firsts = sorted({each.first for s in summaries for each in getattr(s, name)})
    rows = []
    for s in summaries:
        shares = {each.first: f"{100 * each.share:.0f} ({each.count})" for each in getattr(s, name)}
        rows.append([label(s), *(shares.get(first, "") for first in firsts)])
    return markdown([title, *(f"from {first}" for first in firsts)], rows)


def label(summary: ChainSummary) -> str:
    """The configuration in a word or two, unlike that of any other ratio."""
    compressed = summary.ratio is not None and summary.ratio < 1
    return f"{summary.name} r={summary.ratio:g}" if compressed else summary.name


def write_results(folder: Path, samples: Sequence[Sample], about: Mapping[str, Any]) -> str:
    """results.json, results.md and results.svg in the folder; returns the tables."""
    from kvllm.measure.eval.plots import plot_bins

    summaries = summarise(samples)
    results = {**about, **environment(), "results": [asdict(s) for s in summaries]}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(table(summaries) + "\n")
    lines = {
        title: {label(s): [(each.first, each.share) for each in getattr(s, name)] for s in summaries}
        for title, name in (("share solved, by position", "by_position"), ("share recalled, by tokens", "by_distance"))
    }
    plot_bins(lines, folder / "results.svg")
    return table(summaries)


def answer(
    out: Path,
    model: str,
    chains: Sequence[Chain],
    cases: Sequence[Case],
    samples: int,
    cache_dtypes: Sequence[str],
    sampling: Sampling,
    engine_flags: Sequence[str],
) -> None:
    """Make the answers that the folder `out` does not hold yet, and write and print the results after each engine.

    cache_dtypes: of the caches that stock vLLM is measured with too (--kv-cache-dtype), such as fp8
    engine_flags: vLLM's
    """
    engines: dict[str | None, list[Job]] = plan(cases, chains, samples)
    if any(config is not None for config in engines):
        check_plugin_is_loaded()  # before a stock engine answers for hours
    about = {
        "task": TASK,
        "chain_version": CHAIN_VERSION,
        "score_version": SCORE_VERSION,
        "model": Path(model).name,
        **asdict(sampling),
    }
    out.mkdir(parents=True, exist_ok=True)
    check_run(out / RUN, about)
    parts: list[tuple[list[str], dict[str | None, list[Job]]]] = [
        ([], {config: jobs}) for config, jobs in engines.items()
    ]
    for dtype in cache_dtypes:
        jobs = [stock_job(chain, i, dtype) for i in range(samples) for chain in chains]
        parts.append((["--kv-cache-dtype", dtype], {None: jobs}))
    for flags, part in parts:
        start = starter(model, sampling, [*engine_flags, *flags])
        made = run(TASK, part, start, out / LOG, sampling.seed, is_perfect, GRADER, Progress("answers"))
        tables = write_results(out, made, about)
    print(tables)


def stock_job(chain: Chain, sample: int, cache_dtype: str) -> Job:
    """An answer of stock vLLM with another cache type, which compresses nothing."""
    return Job(chain, sample, f"{cache_dtype} cache", {"kv_cache_dtype": cache_dtype}, 1.0)


def is_perfect(text: str, expected: str) -> bool:
    """Whether all of a chain is solved and all of it recalled; figures are made from the texts, not from this."""
    answers = json.loads(expected)
    made = score(Sample(TASK, "", 0, "", None, None, expected, text, 0, "stop"), answers)
    return all(made.correct) and all(made.recalled)
