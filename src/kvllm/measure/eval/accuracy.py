"""Accuracy on problems with answers, over methods and retention ratios, with the length of the answers beside it.

    python -m kvllm.measure.eval.accuracy MODEL --task math500 --methods kara --ratios 0.2,0.3 --samples 4 --out DIR
                                  [vLLM's engine flags]

One engine a method; its ratios, and the full cache, run in it side by side as the requests' own ratios. Each
answer goes to DIR/samples.jsonl when it is done, and a run that finds some there does only the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvllm.engine.arguments import check_plugin_is_loaded
from kvllm.errors import UsageError
from kvllm.measure.eval.engines import Endpoint, Engine, Question, Sampling, VllmEngine
from kvllm.measure.eval.environment import environment
from kvllm.measure.eval.problems import PROMPT_VERSION, Problem, load_problems, spread
from kvllm.measure.eval.report import Progress, interval, markdown
from kvllm.measure.eval.samples import FULL, Sample, read_samples, sample_key, write_sample
from kvllm.measure.eval.stats import Estimate, bootstrap_ratio, wilson
from kvllm.measure.eval.sweep import BASELINES, Case, parse_cases
from kvllm.methods import resolved
from kvllm.options import parse_numbers

# What must be the same for two parts of a run to belong together.
RUN = "run.json"
LOG = "samples.jsonl"
ENDPOINT = "endpoint"


@dataclass(frozen=True)
class Job:
    """One answer to make."""

    problem: Problem
    sample: int
    name: str
    config: Mapping[str, Any] | None
    ratio: float | None

    def key(self, task: str) -> str:
        return sample_key(task, self.problem.id, self.sample, self.config, self.ratio)


def plan(cases: Sequence[Case], problems: Sequence[Problem], samples: int) -> dict[str | None, list[Job]]:
    """The jobs by the engine that does them: a JSON of KvConfig fields, None for stock vLLM.

    The full cache runs in the first engine: at ratio 1.0 nothing in it is compressed.
    """
    engines: dict[str | None, list[Job]] = {}
    asked = [(problem, sample) for sample in range(samples) for problem in problems]
    for case in cases:
        if case.config.enabled:
            options = case.config.to_dict()
            ratio = options.pop("retention_ratio")
            jobs = engines.setdefault(json.dumps(options, sort_keys=True), [])
            jobs += [Job(p, s, case.name, resolved(case.config), ratio) for p, s in asked]
    first = next(iter(engines), None)
    full = [Job(p, s, FULL, None, 1.0) for p, s in asked]
    engines[first] = full + engines.get(first, [])
    return {_allowing_ratios(key, jobs): jobs for key, jobs in engines.items()}


def _allowing_ratios(engine: str | None, jobs: Sequence[Job]) -> str | None:
    """The engine's options, with the ratios of its jobs among those that its requests may choose."""
    if engine is None:
        return None
    options = json.loads(engine)
    wanted = dict.fromkeys(repr(job.ratio) for job in jobs if job.ratio is not None)
    options["request_ratios"] = ",".join(filter(None, [options["request_ratios"], *wanted]))
    return json.dumps(options, sort_keys=True)


def run(
    task: str,
    engines: Mapping[str | None, Sequence[Job]],
    start: Callable[[dict[str, Any] | None], Engine],
    log_path: Path,
    seed: int | None,
    grade: Callable[[str, str], bool],
    grader: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sample]:
    """Do the jobs that the log does not hold yet; returns all of its samples."""
    samples = read_samples(log_path) if log_path.exists() else []
    done = {sample.key for sample in samples}
    todo = {options: [job for job in jobs if job.key(task) not in done] for options, jobs in engines.items()}
    total, finished = sum(map(len, todo.values())), 0
    with log_path.open("a") as log:
        for options, jobs in todo.items():
            if not jobs:
                continue
            engine = start(None if options is None else json.loads(options))
            # Problem and sample alone make the seed, so configurations are compared on the same draws.
            seeds = [None if seed is None else hash_seed(seed, job.problem.id, job.sample) for job in jobs]
            questions = [Question(j.problem.prompt, j.ratio, s) for j, s in zip(jobs, seeds, strict=True)]
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
    """A seed for one request, the same on every machine."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Summary:
    """One configuration.

    accuracy:      share of correct answers: Wilson's interval for one sample a problem, else problems are resampled
    against_full:  difference to the full cache on the problems that both have, problems resampled in pairs
    mean_tokens:   length of an answer
    truncated:     share of answers that max_tokens cut off
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
    """Correct answers, answers and tokens of each problem."""
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


def write_results(folder: Path, samples: Sequence[Sample], about: Mapping[str, Any]) -> str:
    """results.json, results.md and results.svg in the folder; returns the table."""
    from kvllm.measure.eval.plots import plot_accuracy

    summaries = summarise(samples)
    results = {**about, **environment(), "results": [asdict(s) for s in summaries]}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(table(summaries) + "\n")
    plot_accuracy(summaries, folder / "results.svg")
    return table(summaries)


def check_run(path: Path, about: Mapping[str, Any]) -> None:
    """Write what the run is, or raise UsageError where the folder holds another."""
    if not path.exists():
        path.write_text(json.dumps(about, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    if different := sorted(key for key in before | about if before.get(key) != about.get(key)):
        shown = ", ".join(f"{key}={before.get(key)!r}, now {about.get(key)!r}" for key in different)
        raise UsageError(f"{path.parent} holds another run ({shown}); use another --out.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvllm eval accuracy",
        description="Answer problems under compression and grade the answers; what --out holds already is not redone.",
        epilog="Flags not listed here go to vLLM's engine, such as --dtype, --max-model-len or --max-num-seqs.",
    )
    parser.add_argument("model", help="model folder or hub name; with --endpoint, the name that the server knows")
    parser.add_argument("--task", default="math500", help="math500, gsm8k, or with --data a name of your own")
    parser.add_argument("--data", type=Path, help="JSONL of problem and answer, for tasks that do not ship (aime24)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the log and the results")
    parser.add_argument("--methods", help="comma-separated, each at every ratio")
    parser.add_argument("--ratios", help="comma-separated retention ratios (default: 0.3); the full cache is always in")
    parser.add_argument("--configs", nargs="*", default=[], help="shipped sweeps (methods, kara), files, or JSON")
    parser.add_argument("--common", type=json.loads, default={}, help="JSON: options that all configurations share")
    parser.add_argument("--baselines", default=",".join(BASELINES), help="methods measured beside; '' for none")
    parser.add_argument("--problems", type=int, help="only so many, evenly spaced over the task")
    parser.add_argument("--samples", type=int, default=1, help="answers to each problem")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--sampling-seed", type=int, help="makes a seed for each request from problem and sample")
    parser.add_argument("--endpoint", help="ask this OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once to the endpoint")
    options, engine_flags = parser.parse_known_args(arguments)

    from kvllm.measure.eval.grade import GRADER, is_correct

    problems = spread(load_problems(options.task, options.data), options.problems)
    sampling = Sampling(options.max_tokens, options.temperature, options.top_p, options.sampling_seed)
    about = {
        "task": options.task,
        "prompt_version": PROMPT_VERSION,
        "model": Path(options.model).name,
        "endpoint": options.endpoint is not None,
        **asdict(sampling),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    engines: dict[str | None, list[Job]]
    cases: list[Case] = []
    if options.endpoint:
        if engine_flags or options.methods or options.configs:
            raise UsageError("--endpoint: the server's method and flags are its own; only --ratios can be chosen.")
        ratios = parse_numbers("--ratios", options.ratios, float, "0.3,0.5") if options.ratios else [None]
        asked = [(p, s) for s in range(options.samples) for p in problems]
        engines = {None: [Job(p, s, FULL if r == 1 else ENDPOINT, None, r) for r in ratios for p, s in asked]}
    else:
        baselines = [name for name in options.baselines.split(",") if name]
        cases = parse_cases(options.configs, options.methods, options.ratios, options.common, baselines)
        engines = plan(cases, problems, options.samples)
        if any(config is not None for config in engines):
            check_plugin_is_loaded()  # before a stock engine answers for hours

    def start(config: dict[str, Any] | None) -> Engine:
        if options.endpoint:
            return Endpoint(options.endpoint, options.model, sampling, options.concurrency)
        return VllmEngine([options.model, *engine_flags], config, sampling)

    check_run(options.out / RUN, about)
    samples = run(
        options.task, engines, start, options.out / LOG, sampling.seed, is_correct, GRADER, Progress("answers")
    )
    print(write_results(options.out, samples, about))


if __name__ == "__main__":
    main()
