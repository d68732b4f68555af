from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.layout import Geometry
from kvllm.measure.eval import accuracy
from kvllm.measure.eval.accuracy import check_run, plan, run, summarise, table
from kvllm.measure.eval.engines import Completion, Question
from kvllm.measure.eval.grade import is_correct
from kvllm.measure.eval.problems import Problem, load_problems
from kvllm.measure.eval.samples import Sample, read_samples
from kvllm.measure.eval.sweep import FULL, cases
from tests.measure.commands import kvllm

PROBLEMS = [Problem("a", "1 + 1?", "2"), Problem("b", "2 + 2?", "4")]
CASES = cases([{"method": ["kara", "snapkv"], "retention_ratio": [0.3, 0.5]}], baselines=())


class Adder:
    """An engine that answers from the end of the list, and knows sums only with the full cache."""

    started: list[dict[str, Any] | None] = []
    closed = 0
    block_size = 64

    def __init__(self, options: dict[str, Any] | None, fail_after: int | None = None) -> None:
        Adder.started.append(options)
        self.fail_after = fail_after

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        for done, (i, question) in enumerate(reversed(list(enumerate(questions)))):
            if done == self.fail_after:
                raise KeyboardInterrupt
            result = {"1": 2, "2": 4}[question.prompt[0]] + (question.ratio == 0.3)
            yield i, Completion(f"so \\boxed{{{result}}}", 100 if question.ratio == 1.0 else 90, "stop")

    def close(self) -> None:
        Adder.closed += 1


def grade(text: str, expected: str) -> bool:
    return text == f"so \\boxed{{{expected}}}"


@pytest.fixture(autouse=True)
def fresh():
    Adder.started, Adder.closed = [], 0


def test_one_engine_a_method_and_the_full_cache_in_the_first(tmp_path):
    samples = run("sums", plan(CASES, PROBLEMS, 2), Adder, tmp_path / "log", None, grade, "test")
    assert [options["method"] for options in Adder.started if options] == ["kara", "snapkv"] and Adder.closed == 2
    assert [options["retention_ratio"] for options in Adder.started if options] == [0.3, 0.3]
    assert [options["request_ratios"] for options in Adder.started if options] == ["1.0,0.3,0.5", "0.3,0.5"]
    assert len(samples) == 2 * 2 * (1 + 4) and samples == read_samples(tmp_path / "log")
    summaries = summarise(samples)
    assert [(s.name, s.ratio, s.accuracy.value) for s in summaries] == [
        (FULL, 1.0, 1.0), ("kara", 0.3, 0.0), ("snapkv", 0.3, 0.0), ("kara", 0.5, 1.0), ("snapkv", 0.5, 1.0),
    ]  # fmt: skip
    assert summaries[1].against_full and summaries[1].against_full.value == -1
    assert summaries[1].length_of_full == 0.9 and summaries[0].length_of_full is None
    assert table(summaries).count("\n") == 6


def test_an_engine_of_packed_survivors_can_start_with_its_own_ratio():
    """The default's, 0.3, is less than one packed block of a window of 128 tokens."""
    chosen = cases([{"window_size": 128, "survivor_bits": 4, "retention_ratio": [0.875, 0.4375]}], baselines=())
    ((options, jobs),) = plan(chosen, PROBLEMS, 1).items()
    config = KvConfig.from_json(str(options))
    assert config.retention_ratio == 0.875 and {job.ratio for job in jobs} == {1.0, 0.875, 0.4375}
    assert Geometry.from_config(config, 16, packed_tokens=56) is not None
    with pytest.raises(UsageError, match="every window keeps at least one block"):
        Geometry.from_config(replace(config, retention_ratio=0.3), 16, packed_tokens=56)


def test_a_run_that_is_cut_short_has_as_many_samples_of_every_configuration():
    (jobs, *_) = plan(CASES, PROBLEMS, 3).values()
    assert [job.sample for job in jobs] == sorted(job.sample for job in jobs)
    assert {job.ratio for job in jobs if job.sample == 0} == {1.0, 0.3, 0.5}


def test_stock_vllm_where_only_the_full_cache_is_asked_for():
    full = cases([{"retention_ratio": 1.0}])
    assert {k: len(v) for k, v in plan(full, PROBLEMS, 3).items()} == {None: 6}


def test_a_killed_run_continues_where_it_was(tmp_path):
    jobs, log = plan(CASES, PROBLEMS, 1), tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        run("sums", jobs, lambda options: Adder(options, fail_after=2), log, None, grade, "test")
    with log.open("a") as file:
        file.write('{"task": "sums", "problem')  # what a kill leaves
    told: list[tuple[int, int]] = []
    samples = run("sums", jobs, Adder, log, None, grade, "test", lambda *done: told.append(done))
    assert told == [(i, 8) for i in range(9)]
    assert len(samples) == len({s.key for s in samples}) == 10 and read_samples(log) == samples
    Adder.started.clear()
    assert run("sums", jobs, Adder, log, None, grade, "test") == samples and not Adder.started


def test_seeds_do_not_depend_on_the_configuration(tmp_path):
    seen: list[Question] = []

    class Recorder(Adder):
        def answer(self, questions):
            seen.extend(questions)
            return super().answer(questions)

    run("sums", plan(CASES[:2], PROBLEMS, 2), Recorder, tmp_path / "log", 7, grade, "test")
    by_ratio = {ratio: [q.seed for q in seen if q.ratio == ratio] for ratio in (1.0, 0.3, 0.5)}
    assert by_ratio[1.0] == by_ratio[0.3] and len(set(by_ratio[1.0])) == 4


def sample(problem: str, number: int, correct: bool | None, name: str = "kara", tokens: int = 10) -> Sample:
    ratio = 1.0 if name == FULL else 0.3
    return Sample("t", problem, number, name, None, ratio, "1", "1", tokens, "stop", correct, "test")


def test_summary_of_several_samples_resamples_problems():
    given = [sample(p, i, p != "a") for p in "abcd" for i in range(4)]
    full = [sample(p, 0, True, FULL, tokens=20) for p in "abcd"]
    one, other = summarise(given + full)
    assert one.name == FULL and one.accuracy.value == 1 and one.accuracy.low == pytest.approx(0.5101, abs=1e-4)
    assert other.accuracy.value == 0.75 and other.accuracy.low < 0.5 and other.num_problems == 4
    assert other.against_full and other.against_full.value == -0.25 and other.length_of_full == 0.5
    with pytest.raises(ValueError, match="1 samples are not graded"):
        summarise([sample("a", 0, None)])


def test_a_folder_holds_one_run(tmp_path):
    check_run(tmp_path / "run.json", {"task": "t", "max_tokens": 9})
    check_run(tmp_path / "run.json", {"task": "t", "max_tokens": 9})
    with pytest.raises(ValueError, match="holds another run .max_tokens=9, now 10."):
        check_run(tmp_path / "run.json", {"task": "t", "max_tokens": 10})


@pytest.mark.parametrize(
    "text, expected, correct",
    [
        ("We get $\\frac{1}{2}$, so \\boxed{0.5}.", "\\frac{1}{2}", True),
        ("first \\boxed{3}, no: \\boxed{4}", "4", True),
        ("first \\boxed{3}, no: \\boxed{4}", "3", False),
        ("Either \\boxed{3} or \\boxed{4}", "\\{3, 4\\}", True),
        ("The answer is 1,024.", "1024", True),
        ("\\boxed{(3, \\pi/2)}", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", True),
        ("\\boxed{5}", "4", False),
        ("I do not know.", "4", False),
        ("", "4", False),
    ],
)
def test_grading(text, expected, correct):
    assert is_correct(text, expected) is correct


def test_the_shipped_answers_are_correct_answers():
    for task in ("math500", "gsm8k"):
        for problem in load_problems(task)[::25]:
            assert is_correct(f"Therefore \\boxed{{{problem.answer}}}.", problem.answer), problem


def test_regrading_corrects_the_log_and_writes_the_results(tmp_path, capsys):
    jobs = plan(CASES[:2], PROBLEMS, 1)
    run("sums", jobs, Adder, tmp_path / "samples.jsonl", None, lambda text, expected: False, "math-verify 0.0")
    kvllm("eval", "grade", str(tmp_path / "samples.jsonl"))
    samples = read_samples(tmp_path / "samples.jsonl")
    assert sum(bool(s.correct) for s in samples) == 4 and "math-verify" in str(samples[0].grader)
    assert "6 answers graded, 4 of them differently" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["accuracy"]["value"] for r in results] == [1.0, 0.0, 1.0]
    assert (tmp_path / "results.svg").stat().st_size > 1000


def test_the_command_runs_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "VllmEngine", lambda arguments, options, sampling: Adder(options))
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"problem": p.problem, "answer": p.answer}) + "\n" for p in PROBLEMS))
    arguments = ["eval", "accuracy", "tiny", "--task", "sums", "--data", str(data), "--out", str(tmp_path / "out")]
    arguments += ["--ratios", "0.3,0.5"]
    kvllm(*arguments, "--methods", "kara", "--baselines", "random", "--max-num-seqs", "4")
    said = capsys.readouterr()
    assert len(Adder.started) == 2 and "| full cache |" in said.out
    kvllm(*arguments, "--methods", "kara", "--baselines", "", "--max-num-seqs", "4")
    assert len(Adder.started) == 2  # all of it was in the log
    with pytest.raises(ValueError, match="only --ratios can be chosen"):
        kvllm(*arguments, "--methods", "kara", "--endpoint", "http://localhost:1/v1")


def test_layer_budgets_are_refused_since_requests_carry_one_ratio():
    table = cases([{"method": "kara", "retention_ratio": {"0": 0.5, "1": 0.1}}], baselines=())
    with pytest.raises(ValueError, match=r"^kara 0:0.5 1:0.1 r=0.3: per-request ratios apply to .* use --endpoint\."):
        plan(table, PROBLEMS, 1)
