"""Let a model trained on programs execute them in one long answer, which needs its earlier results.

    kvllm eval tracking MODEL --methods kara,rkv --ratios 0.5,0.3,0.2,0.1 --out DIR [vLLM's flags]

`benchmarks/small_model/train.py` trains MODEL. An answer is correct if all requested values are. Also reported is the
share of lines with a correct result, which is a more sensitive measure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvllm.engine.arguments import check_plugin_is_loaded
from kvllm.measure.environment import environment
from kvllm.measure.eval.accuracy import LOG, RUN, check_run, plan, run, summarise
from kvllm.measure.eval.engines import Engine, Sampling, VllmEngine
from kvllm.measure.eval.plots import Panel, panels_of, plot_curves
from kvllm.measure.eval.programs import (
    ANSWER_LINE,
    PROGRAMS_VERSION,
    Program,
    is_correct,
    lines_right,
    problems,
    values_right,
)
from kvllm.measure.eval.report import Progress, interval, markdown
from kvllm.measure.eval.samples import Sample
from kvllm.measure.eval.stats import Estimate, bootstrap_ratio
from kvllm.measure.eval.sweep import FULL, Case

TASK = "tracking"
GRADE_VERSION = 1
GRADER = f"tracking v{GRADE_VERSION}"


@dataclass(frozen=True)
class Row:
    """Results of one configuration: shares of correct answers, values and lines.

    The intervals of values and lines are bootstrapped over programs.
    """

    name: str
    ratio: float | None
    config: Mapping[str, Any] | None
    num_programs: int
    answers: Estimate
    against_full: Estimate | None
    values: Estimate
    lines: Estimate


def rows(samples: Sequence[Sample], asked: Sequence[Program]) -> list[Row]:
    by_id = {program.id: program for program in asked}
    made = []
    for s in summarise(samples):
        own = [x for x in samples if (x.name, x.ratio, x.config) == (s.name, s.ratio, s.config)]
        one = [1.0] * len(own)
        values = bootstrap_ratio([values_right(x.text, x.expected) for x in own], one)
        lines = bootstrap_ratio([lines_right(x.text, by_id[x.problem_id]) for x in own], one)
        made.append(Row(s.name, s.ratio, s.config, len(own), s.accuracy, s.against_full, values, lines))
    return made


def table(made: Sequence[Row]) -> str:
    header = ["ratio", "method", "programs", "answers right %", "less full's", "values right %", "lines right %"]
    body = [
        [
            "" if row.ratio is None else f"{row.ratio:g}",
            row.name,
            str(row.num_programs),
            interval(row.answers, 1, scale=100),
            interval(row.against_full, 1, scale=100) if row.against_full else "",
            interval(row.values, 1, scale=100),
            interval(row.lines, 1, scale=100),
        ]
        for row in made
    ]
    return markdown(header, body)


def panels(made: Sequence[Row]) -> list[Panel]:
    full = next((row for row in made if row.name == FULL), None)
    return panels_of(made, full, {"answers right": "answers", "values right": "values", "lines right": "lines"})


def write_results(folder: Path, samples: Sequence[Sample], asked: Sequence[Program], about: Mapping[str, Any]) -> str:
    """Write results.json, results.md and results.svg to the folder; returns the table."""
    made = rows(samples, asked)
    results = {**about, **environment(), "results": [asdict(row) for row in made]}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(table(made) + "\n")
    plot_curves(panels(made), folder / "results.svg")
    return table(made)


def answer(
    out: Path,
    model: str,
    cases: Sequence[Case],
    num_programs: int,
    num_lines: int,
    num_asked: int,
    seed: int,
    engine_flags: Sequence[str],
) -> None:
    """Generate the answers missing from the folder `out`, and write and print the results. engine_flags: vLLM's"""
    asked = problems(num_programs, num_lines, num_asked, seed)
    engines = plan(cases, asked, samples=1)
    if any(config is not None for config in engines):
        check_plugin_is_loaded()
    sampling = Sampling(max_tokens=ANSWER_LINE * num_lines + 2 * num_asked + 16, temperature=0.0, top_p=1.0)
    about = {
        "task": TASK,
        "programs_version": PROGRAMS_VERSION,
        "grader": GRADER,
        "model": Path(model).name,
        "lines": num_lines,
        "asked": num_asked,
        "seed": seed,
    }

    def start(config: dict[str, Any] | None) -> Engine:
        return VllmEngine([model, *engine_flags], config, sampling)

    out.mkdir(parents=True, exist_ok=True)
    check_run(out / RUN, about)
    samples = run(TASK, engines, start, out / LOG, None, is_correct, GRADER, Progress("answers"))
    print(write_results(out, samples, asked, about))
