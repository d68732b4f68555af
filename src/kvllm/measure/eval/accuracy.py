"""Accuracy and answer length on problems with known answers, by method and retention ratio.

    kvllm eval accuracy MODEL --task math500 --methods kara --ratios 0.2,0.3 --samples 4 --out DIR [vLLM's flags]

Each method gets one engine; its ratios and the full cache run in it together, as per-request ratios. Every finished
answer is appended to DIR/samples.jsonl, and a run continues from the answers that are already there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvllm.engine.arguments import check_plugin_is_loaded
from kvllm.errors import UsageError
from kvllm.measure.environment import environment
from kvllm.measure.eval.engines import Endpoint, Engine, Question, Sampling, VllmEngine
from kvllm.measure.eval.grade import GRADER, is_correct
from kvllm.measure.eval.plots import Panel, panels_of, plot_curves
from kvllm.measure.eval.problems import PROMPT_VERSION, Asked
from kvllm.measure.eval.report import Progress, interval, markdown
from kvllm.measure.eval.samples import Sample, read_samples, sample_key, write_sample
from kvllm.measure.eval.stats import Estimate, bootstrap_ratio, wilson
from kvllm.measure.eval.sweep import FULL, Case
from kvllm.methods import resolved

Start = Callable[[dict[str, Any] | None], Engine]  # fields of KvConfig, None: stock vLLM

# Must be equal for a run to be continued.
RUN = "run.json"
LOG = "samples.jsonl"
ENDPOINT = "endpoint"


@dataclass(frozen=True)
class Job:
    """One answer to generate."""

    problem: Asked
    sample: int
    name: str
    config: Mapping[str, Any] | None
    ratio: float | None

    def key(self, task: str) -> str:
        return sample_key(task, self.problem.id, self.sample, self.config, self.ratio)


def plan(cases: Sequence[Case], problems: Sequence[Asked], samples: int) -> dict[str | None, list[Job]]:
    """The jobs of each engine, whose key is its KvConfig fields as JSON, or None for stock vLLM.

    The full cache runs in the first engine, at ratio 1.0. Jobs are ordered by sample, so that an interrupted run has
    about equally many of every configuration.
    """
    engines: dict[str | None, list[Job]] = {}
    asked = [(problem, sample) for sample in range(samples) for problem in problems]
    for case in cases:
        if case.config.enabled:
            if case.config.budgets:
                raise UsageError(
                    f"{case.label}: per-request ratios apply to all layers, so a table cannot be used here. Serve the "
                    "model with the table and use --endpoint."
                )
            options = case.config.to_dict()
            ratio = options.pop("retention_ratio")
            jobs = engines.setdefault(json.dumps(options, sort_keys=True), [])
            jobs += [Job(p, s, case.name, resolved(case.config), ratio) for p, s in asked]
    first = next(iter(engines), None)
    full = [Job(p, s, FULL, None, 1.0) for p, s in asked]
    engines[first] = full + engines.get(first, [])
    return {_allowing_ratios(key, jobs): sorted(jobs, key=lambda job: job.sample) for key, jobs in engines.items()}


def _allowing_ratios(engine: str | None, jobs: Sequence[Job]) -> str | None:
    """The engine's options, which allow its requests the ratios of its jobs.

    One of these is also the engine's own ratio, since the default may not fit its window size and bits.
    """
    if engine is None:
        return None
    options = json.loads(engine)
    wanted = dict.fromkeys(job.ratio for job in jobs if job.ratio is not None)
    options["retention_ratio"] = next(ratio for ratio in wanted if ratio < 1)
    options["request_ratios"] = ",".join(filter(None, [options["request_ratios"], *map(repr, wanted)]))
    return json.dumps(options, sort_keys=True)


def run(
    task: str,
    engines: Mapping[str | None, Sequence[Job]],
    start: Start,
    log_path: Path,
    seed: int | None,
    grade: Callable[[str, str], bool],
    grader: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sample]:
    """Run the jobs that are missing from the log; returns all of its samples."""
    samples = read_samples(log_path) if log_path.exists() else []
    done = {sample.key for sample in samples}
    todo = {options: [job for job in jobs if job.key(task) not in done] for options, jobs in engines.items()}
    total, finished = sum(map(len, todo.values())), 0
    if total:
        progress(0, total)
    with log_path.open("a") as log:
        for options, jobs in todo.items():
            if not jobs:
                continue
            engine = start(None if options is None else json.loads(options))
            # The seed depends only on problem and sample, so configurations are compared with the same random numbers.
            seeds = [None if seed is None else hash_seed(seed, job.problem.id, job.sample) for job in jobs]
            questions = [
                Question(j.problem.prompt, j.ratio, s, j.problem.examples) for j, s in zip(jobs, seeds, strict=True)
            ]
            for i, completion in engine.answer(questions):
                job = jobs[i]
                sample = Sample(
                    task=task,
                    problem_id=job.problem.id,
                    sample=job.sample,
                    name=job.name,
                    config=job.config,
                    ratio=job.ratio,
                    expected=job.problem.answer,
                    text=completion.text,
                    num_tokens=completion.num_tokens,
                    finish_reason=completion.finish_reason,
                    correct=grade(completion.text, job.problem.answer),
                    grader=grader,
                )
                write_sample(log, sample)
                samples.append(sample)
                finished += 1
                progress(finished, total)
            engine.close()
    return samples


def hash_seed(seed: int, problem_id: str, sample: int) -> int:
    """A request's seed, the same on every machine."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Summary:
    """Results of one configuration.

    accuracy:      share of correct answers; Wilson interval for one sample per problem, else bootstrap over problems
    against_full:  difference from the full cache on their common problems, paired bootstrap over problems
    mean_tokens:   mean answer length
    truncated:     share of answers cut off by max_tokens
    """

    name: str
    ratio: float | None
    config: Mapping[str, Any] | None
    num_samples: int
    num_problems: int
    accuracy: Estimate
    against_full: Estimate | None
    mean_tokens: Estimate
    length_of_full: float | None
    truncated: float


def summarise(samples: Sequence[Sample]) -> list[Summary]:
    """The full cache first, then by ratio and accuracy."""
    if ungraded := sum(s.correct is None for s in samples):
        raise UsageError(f"{ungraded} samples are not graded; run `kvllm eval grade` on the log.")
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        groups.setdefault(json.dumps([s.name, s.ratio, s.config], sort_keys=True), []).append(s)
    full = next((group for group in groups.values() if group[0].name == FULL), None)
    made = [_summary(group, full) for group in groups.values()]
    return sorted(made, key=lambda s: (s.name != FULL, s.ratio or 0, -s.accuracy.value))


def _summary(group: Sequence[Sample], full: Sequence[Sample] | None) -> Summary:
    correct, counts, tokens = _by_problem(group)
    sums = np.array(list(correct.values()))
    num = np.array([counts[p] for p in correct])
    once = int(num.max()) == 1
    accuracy = wilson(int(sums.sum()), int(num.sum())) if once else bootstrap_ratio(sums, num)
    lengths = bootstrap_ratio([tokens[p] for p in correct], num)
    against, length = None, None
    if full is not None and full is not group:
        full_correct, full_counts, full_tokens = _by_problem(full)
        both = [p for p in correct if p in full_correct]
        if both:
            differences = [correct[p] / counts[p] - full_correct[p] / full_counts[p] for p in both]
            against = bootstrap_ratio(differences, np.ones(len(both)))
            per_full = sum(full_tokens[p] / full_counts[p] for p in both)
            length = float(sum(tokens[p] / counts[p] for p in both) / per_full)
    return Summary(
        name=group[0].name,
        ratio=group[0].ratio,
        config=group[0].config,
        num_samples=len(group),
        num_problems=len(correct),
        accuracy=accuracy,
        against_full=against,
        mean_tokens=lengths,
        length_of_full=length,
        truncated=sum(s.finish_reason == "length" for s in group) / len(group),
    )


def _by_problem(group: Sequence[Sample]) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Number of correct answers, of answers and of tokens per problem."""
    correct: dict[str, int] = {}
    counts: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for s in group:
        correct[s.problem_id] = correct.get(s.problem_id, 0) + bool(s.correct)
        counts[s.problem_id] = counts.get(s.problem_id, 0) + 1
        tokens[s.problem_id] = tokens.get(s.problem_id, 0) + s.num_tokens
    return correct, counts, tokens


def table(summaries: Sequence[Summary]) -> str:
    rows = [
        [
            "" if s.ratio is None else f"{s.ratio:g}",
            s.name,
            f"{s.num_problems} x {s.num_samples / s.num_problems:g}",
            interval(s.accuracy, 1, scale=100),
            interval(s.against_full, 1, scale=100) if s.against_full else "",
            f"{s.mean_tokens.value:.0f}",
            f"{100 * s.length_of_full:.0f}" if s.length_of_full is not None else "",
            f"{100 * s.truncated:.1f}",
        ]
        for s in summaries
    ]
    header = ["ratio", "method", "samples", "accuracy %", "less full's", "mean tokens", "% of full's", "cut off %"]
    return markdown(header, rows)


def panels(summaries: Sequence[Summary]) -> list[Panel]:
    """Plot accuracy and answer length against the retention ratio."""
    full = next((s for s in summaries if s.name == FULL), None)
    return panels_of(summaries, full, {"accuracy": "accuracy", "mean tokens an answer": "mean_tokens"})


def write_results(folder: Path, samples: Sequence[Sample], about: Mapping[str, Any]) -> str:
    """Write results.json, results.md and results.svg to the folder; returns the table."""
    summaries = summarise(samples)
    results = {**about, **environment(), "results": [asdict(s) for s in summaries]}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(table(summaries) + "\n")
    plot_curves(panels(summaries), folder / "results.svg")
    return table(summaries)


def check_run(path: Path, about: Mapping[str, Any]) -> None:
    """Record the run's settings, or raise UsageError if the folder contains a run with others."""
    if not path.exists():
        path.write_text(json.dumps(about, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    if different := sorted(key for key in before | about if before.get(key) != about.get(key)):
        shown = ", ".join(f"{key}={before.get(key)!r}, now {about.get(key)!r}" for key in different)
        raise UsageError(f"{path.parent} holds another run ({shown}); use another --out.")


def at_endpoint(problems: Sequence[Asked], samples: int, ratios: Sequence[float | None]) -> dict[str | None, list[Job]]:
    """The jobs for a server, which has its own method; ratio None: the server's default."""
    asked = [(p, s) for s in range(samples) for p in problems]
    return {None: [Job(p, s, FULL if r == 1 else ENDPOINT, None, r) for r in ratios for p, s in asked]}


def answer(
    out: Path,
    task: str,
    model: str,
    engines: Mapping[str | None, Sequence[Job]],
    sampling: Sampling,
    engine_flags: Sequence[str],
    endpoint: str | None,
    concurrency: int,
) -> None:
    """Run the jobs that are missing from the folder `out`, grade them, and write and print the results.

    engine_flags: vLLM's
    endpoint:     URL of an OpenAI-compatible server to use instead of an engine
    """
    if any(config is not None for config in engines):
        check_plugin_is_loaded()  # fail before a stock engine runs for hours
    about = {
        "task": task,
        "prompt_version": PROMPT_VERSION,
        "model": Path(model).name,
        "endpoint": endpoint is not None,
        **asdict(sampling),
    }

    start = starter(model, sampling, engine_flags, endpoint, concurrency)
    out.mkdir(parents=True, exist_ok=True)
    check_run(out / RUN, about)
    samples = run(task, engines, start, out / LOG, sampling.seed, is_correct, GRADER, Progress("answers"))
    print(write_results(out, samples, about))


def starter(
    model: str, sampling: Sampling, engine_flags: Sequence[str], endpoint: str | None = None, concurrency: int = 64
) -> Start:
    """A function that starts an engine with given options, or connects to the server at `endpoint`."""

    def start(config: dict[str, Any] | None) -> Engine:
        if endpoint:
            return Endpoint(endpoint, model, sampling, concurrency)
        return VllmEngine([model, *engine_flags], config, sampling)

    return start
