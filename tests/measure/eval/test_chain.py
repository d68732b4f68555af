from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvllm.measure.eval import accuracy
from kvllm.measure.eval.chain_score import ChainScore, read_list, read_results, score
from kvllm.measure.eval.chain_summary import summarise, table
from kvllm.measure.eval.chains import FORMATS, WORKED, Chain, make_chains, request, worked_answer
from kvllm.measure.eval.engines import Completion, Exchange, Question, Sampling
from kvllm.measure.eval.problems import Problem, load_problems
from kvllm.measure.eval.samples import Sample
from kvllm.measure.eval.sweep import FULL
from tests.measure.commands import kvllm

CHECKED = "### Problem 1\nTwo and two are 4.\nAnswer 1: 4\n\n### Problem 2\n5 - 3 = 2\nAnswer 2: 2\n\n"


def scored(text: str, expected: Sequence[str], finish_reason: str = "stop") -> ChainScore:
    return score(Sample("chain", "c", 0, "kara", None, 0.3, "", text, len(text), finish_reason), expected)


def found(text: str, count: int) -> tuple[dict[int, str], dict[int, str]]:
    results, entries = read_results(text, count), read_list(text, count)
    return {k: str(s.value) for k, s in results.items()}, {k: str(s.value) for k, s in entries.items()}


@pytest.mark.parametrize("restated", [False, True])
def test_the_worked_example_is_read_as_right_and_finished(restated):
    expected = [str(worked.answer) for worked in WORKED]
    made = scored(worked_answer(restated), expected)
    assert made.finished and made.accuracy == 1 and made.recall == 1
    distances = [distance or 0 for distance in made.distance]
    assert distances == sorted(distances, reverse=True) and distances[0] > 400 and 0 < distances[-1] < 60


@pytest.mark.parametrize(
    "text, results, entries",
    [
        (CHECKED + "All answers:\n1: 4\n2: 2", {1: "4", 2: "2"}, {1: "4", 2: "2"}),
        (CHECKED + "**All answers:**\n\n1. **4**\n2. **$2**\n", {1: "4", 2: "2"}, {1: "4", 2: "2"}),
        (CHECKED + "### All answers\n- Problem 1: 4 apples\n- Problem 2: 3", {1: "4", 2: "2"}, {1: "4", 2: "3"}),
        (CHECKED + "Here are all the answers: \n1: 4, 2: 2", {1: "4", 2: "2"}, {1: "4", 2: "2"}),
        (CHECKED + "All answers:\nAnswer 1: 4\nAnswer 2: 2", {1: "4", 2: "2"}, {1: "4", 2: "2"}),
        (CHECKED + "All answers:\n1: \\boxed{4}\n2: \\(2\\)", {1: "4", 2: "2"}, {1: "4", 2: "2"}),
        (CHECKED + "1: 4\n2: 2", {1: "4", 2: "2"}, {1: "4", 2: "2"}),  # no heading
        (CHECKED, {1: "4", 2: "2"}, {}),
        ("**Problem 1**\n1,000 + 24 = 1,024\n**Answer 1:** $1,024.50\n", {1: "1024.50"}, {}),
        ("## Problem 1:\nx\nThe final answer to problem 1 is 12 * 3 = 36 dollars.", {1: "36"}, {}),
        ("Problem 1: How many?\nSo \\boxed{7} of 9.\n\nProblem 2: And now?\nAnswer 2: -3", {1: "7", 2: "-3"}, {}),
        # The last section was cut off before its answer line.
        ("### Problem 1\nAnswer 1: 5\n### Problem 2\nFirst, 3 + 4 = 7", {1: "5"}, {}),
        # A summary inside a solution is no list, and the first answer to a problem counts.
        ("Problem 1\nSummary:\n1: 9\nAnswer 1: 5\nProblem 2\nAnswer 2: 6\nAnswer 2: 8", {1: "5", 2: "6"}, {2: "8"}),
        ("", {}, {}),
    ],
)  # fmt: skip
def test_answers_are_read_in_the_forms_that_models_use(text, results, entries):
    assert found(text, 2) == (results, entries)


def test_recall_counts_all_results_that_the_answer_reached():
    made = scored(CHECKED + "All answers:\n1: 4\n2: 7", ["4", "3"])
    assert made.correct == (True, False) and made.recalled == (True, False) and made.finished
    made = scored(CHECKED + "All answers:\n1: 4.0\n2: 2", ["4", "3", "1"])
    assert made.correct == (True, False, False) and made.recalled == (True, True, None) and made.recall == 1
    assert not made.finished and made.distance[2] is None
    assert not scored(CHECKED + "All answers:\n1: 4\n2: 2", ["4", "2"], "length").finished
    assert scored("", ["4"]).recall == 0


def test_chains_share_no_problem_before_all_are_used():
    problems = load_problems("gsm8k")
    chains = make_chains(problems, "test", 30, 24, "example")
    used = [problem.id for chain in chains[:27] for problem in chain.problems]
    assert len(set(used)) == len(used) == 27 * 24 and all(int(i.split("/")[-1]) % 2 for i in used)
    assert chains == make_chains(problems, "test", 30, 24, "example") and len({chain.id for chain in chains}) == 30
    tuning = make_chains(problems, "train", 27, 24, "example")
    assert not {problem.id for chain in tuning for problem in chain.problems} & set(used)
    with pytest.raises(ValueError, match="format 'rule': must be one of example, rules, restate"):
        make_chains(problems, None, 1, 2, "rule")
    with pytest.raises(ValueError, match="--length 3: there are only 2 problems"):
        make_chains(problems[:2], None, 1, 3, "rules")


@pytest.mark.parametrize("format", FORMATS)
def test_the_example_comes_before_the_question(format):
    chain = Chain("c", (Problem("1", "1 + 1\n= ?", "2"),), format)
    question = Question(chain.prompt, None, None, chain.examples)
    roles = [message["role"] for message in question.messages]
    assert roles == (["user"] if format == "rules" else ["user", "assistant", "user"])
    assert question.messages[-1]["content"].endswith("Problem 1: 1 + 1 = ?") and json.loads(chain.answer) == ["2"]


class Letters:
    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_a_model_without_a_chat_template_gets_paragraphs():
    ids = Question("c", None, None, (Exchange("a", "b"),)).token_ids(Letters())
    assert "".join(map(chr, ids)) == "a\n\nb\n\nc"


def chain_sample(chain: str, name: str, ratio: float, forgotten: int, config: dict[str, Any] | None) -> Sample:
    listed = "\n".join(f"{k}: {9 if k <= forgotten else k}" for k in (1, 2, 3, 4))
    text = "\n".join(f"### Problem {k}\nAnswer {k}: {k}" for k in (1, 2, 3, 4)) + f"\nAll answers:\n{listed}"
    return Sample("chain", chain, 0, name, config, ratio, '["1", "2", "3", "5"]', text, 100, "stop")


def test_configurations_are_compared_chain_by_chain():
    sizes = {"policy": "window", "window_size": 256, "buffer_size": 128, "budget_size": 1, "survivor_bits": 4}
    sizes |= {"history_size": 0}
    samples = []
    for i in range(6):
        samples += [
            chain_sample(f"c{i}", "kara 4x", 0.5, i % 2, {"method": "kara", **sizes}),
            chain_sample(f"c{i}", FULL, 1.0, 0, None),
            chain_sample(f"c{i}", "random", 0.5, 2, {"method": "random", **sizes}),
            chain_sample(f"c{i}", "fp8 cache", 1.0, 0, {"kv_cache_dtype": "fp8"}),
        ]
    full, kara, random, fp8 = summarise(samples)
    assert (
        full.name == FULL and full.accuracy.value == 0.75 and full.recall.value == 1 and full.recall_less_full is None
    )
    assert kara.recall.value == pytest.approx(0.875) and kara.num_chains == 6 and kara.recall_less_full is not None
    assert kara.recall_less_full.value == pytest.approx(-0.125) and kara.recall_less_full.low < -0.125
    assert kara.recall_less_random is not None and kara.recall_less_random.value == pytest.approx(0.375)
    assert random.recall_less_random is None and fp8.recall_less_random is None
    assert fp8.recall_less_full is not None and fp8.recall_less_full.value == 0
    assert [(b.first, b.share, b.count) for b in kara.by_position] == [(1, 1, 6), (2, 1, 6), (3, 1, 6), (4, 0, 6)]
    assert sum(b.count for b in kara.by_distance) == 24
    assert "| kara 4x" in table([full, kara]) and "r=0.5" in table([full, kara])


class Solver:
    """An engine that solves every chain, and forgets the first result where anything is compressed."""

    started: list[tuple[list[str], Any]] = []

    def __init__(self, arguments: Sequence[str], options: dict[str, Any] | None, sampling: Sampling) -> None:
        Solver.started.append((list(arguments), options))

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        for i, question in enumerate(questions):
            count = question.prompt.count("\n\nProblem ")
            results = "\n".join(f"### Problem {k}\nAnswer {k}: 2" for k in range(1, count + 1))
            listed = "\n".join(f"{k}: {2 if question.ratio == 1 or k > 1 else 3}" for k in range(1, count + 1))
            yield i, Completion(f"{results}\n\nAll answers:\n{listed}", 50 * count, "stop")

    def close(self) -> None:
        pass


def test_the_command_measures_the_full_cache_fp8_and_every_method(tmp_path, monkeypatch, capsys):
    Solver.started = []
    monkeypatch.setattr(accuracy, "VllmEngine", Solver)
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i} + {2 - i}?", "answer": "2"}) + "\n" for i in range(16)))
    arguments = ["eval", "chain", "tiny", "--data", str(data), "--out", str(tmp_path / "out"), "--half", "test"]
    arguments += [
        "--chains",
        "3",
        "--length",
        "4",
        "--configs",
        "chain",
        "--cache-dtypes",
        "fp8",
        "--max-num-seqs",
        "4",
    ]
    kvllm(*arguments)
    # kara and random in 16 and in 4 bits, snapkv, rkv; then stock vLLM with an fp8 cache.
    assert len(Solver.started) == 7 and Solver.started[-1] == (
        ["tiny", "--max-num-seqs", "4", "--kv-cache-dtype", "fp8"],
        None,
    )
    results = {r["name"]: r for r in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
    assert results[FULL]["recall"]["value"] == 1 and results["fp8 cache"]["recall"]["value"] == 1
    assert results["kara 4x"]["recall"]["value"] == 0.75 and results["kara 4x"]["accuracy"]["value"] == 1
    assert results["kara 4x"]["recall_less_random"]["value"] == 0
    assert (tmp_path / "out" / "results.svg").stat().st_size > 1000
    capsys.readouterr()
    kvllm(*arguments)
    assert len(Solver.started) == 7 and "| kara 8x" in capsys.readouterr().out  # all of it was in the log


def test_a_prompt_shows_the_rules_and_every_problem():
    asked = request(["a?", "b\n c?"])
    assert "the 2 problems" in asked and asked.endswith("Problem 1: a?\n\nProblem 2: b c?")
