"""Long chains of thought: solve many problems in one answer, then repeat all results, by method and cache type.

    kvllm eval chain MODEL --configs chain --half test --chains 24 --length 24 --out DIR [vLLM's flags]

Runs and logs like `accuracy`. Intervals are bootstrapped over chains, paired for comparisons of two configurations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvllm.engine.arguments import check_plugin_is_loaded
from kvllm.measure.environment import environment
from kvllm.measure.eval.accuracy import LOG, RUN, Job, check_run, plan, run, starter
from kvllm.measure.eval.chain_score import SCORE_VERSION, score
from kvllm.measure.eval.chain_summary import label, summarise, table
from kvllm.measure.eval.chains import CHAIN_VERSION, Chain
from kvllm.measure.eval.engines import Sampling
from kvllm.measure.eval.report import Progress
from kvllm.measure.eval.samples import Sample
from kvllm.measure.eval.sweep import Case

TASK = "chain"
GRADER = f"chain score v{SCORE_VERSION}"


def write_results(folder: Path, samples: Sequence[Sample], about: Mapping[str, Any]) -> str:
    """Write results.json, results.md and results.svg to the folder; returns the tables."""
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
    """Generate the answers missing from the folder `out`, and write and print the results after each engine.

    cache_dtypes: values of --kv-cache-dtype, such as fp8, to measure stock vLLM with
    engine_flags: vLLM's
    """
    engines: dict[str | None, list[Job]] = plan(cases, chains, samples)
    if any(config is not None for config in engines):
        check_plugin_is_loaded()  # fail before a stock engine runs for hours
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
    """An answer by stock vLLM with another cache type."""
    return Job(chain, sample, f"{cache_dtype} cache", {"kv_cache_dtype": cache_dtype}, 1.0)


def is_perfect(text: str, expected: str) -> bool:
    """Whether all of a chain is solved and recalled, for the log; results are computed from the texts."""
    answers = json.loads(expected)
    made = score(Sample(TASK, "", 0, "", None, None, expected, text, 0, "stop"), answers)
    return all(made.correct) and all(made.recalled)
