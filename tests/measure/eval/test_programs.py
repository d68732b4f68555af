from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kvllm.errors import UsageError
from kvllm.measure.eval import accuracy, programs, tracking
from kvllm.measure.eval.engines import Completion
from kvllm.measure.eval.programs import MODULUS, NUM_ROOTS, VOCABULARY, execute, words
from kvllm.measure.eval.regrade import run as regrade
from kvllm.measure.eval.sweep import cases

PROGRAM = "v0 7 +1 ; v1 3 -2 ; v2 0 +1 ; v3 9 +1 ; v4 v0 -3 ; v5 v4 +2 ; ask v5 v0 run"
ANSWER = (
    "v0 7 +1 : 7 7 v0 8 ; v1 3 -2 : 3 3 v1 1 ; v2 0 +1 : 0 0 v2 1 ; v3 9 +1 : 9 9 v3 0 ; "
    "v4 v0 -3 : v0 8 v4 5 ; v5 v4 +2 : v4 5 v5 7 ; answer v5 7 v0 8"
)


def test_a_program_is_executed():
    assert execute(PROGRAM) == {"v0": 8, "v1": 1, "v2": 1, "v3": 0, "v4": 5, "v5": 7}


def test_answers_are_executions_of_their_programs():
    drawn = programs.programs(20, 30, 4, np.random.default_rng(0))
    for prompt, answer in zip(drawn.prompts, drawn.answers, strict=True):
        values, text = execute(words(prompt)), words(answer)
        lines = [line.split() for line in text.split(" answer ")[0].split(";")[:30]]
        for n, (name, used, step, _, again, found, result, value) in enumerate(lines):
            assert name == result == f"v{n}" and used == again
            assert int(found) == (values[used] if n >= NUM_ROOTS else int(used))
            assert int(value) == values[name] == (int(found) + int(step)) % MODULUS
        asked = words(prompt).split(" ask ")[1].split()[:-1]
        assert len(set(asked)) == 4
        assert text.split(" answer ")[1].split() == [word for name in asked for word in (name, str(values[name]))]


def test_operands_lie_anywhere_before():
    """Else an answer could be had from its newest lines alone."""
    drawn = programs.programs(400, 40, 1, np.random.default_rng(0))
    used = np.array([[int(line.split()[1][1:]) for line in words(p).split(";")[30:40]] for p in drawn.prompts])
    distance = np.arange(30, 40) - used
    assert 0.2 < (distance > 25).mean() < 0.3 and distance.min() == 1


def test_the_tokenizer_has_a_token_a_word(tmp_path):
    programs.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    drawn = programs.programs(1, 20, 2, np.random.default_rng(0))
    assert tokenizer.encode(words(drawn.prompts[0])) == drawn.prompts[0].tolist()
    assert tokenizer.decode(drawn.answers[0], skip_special_tokens=True) == words(drawn.answers[0])
    assert len(tokenizer) == len(set(VOCABULARY)) == len(VOCABULARY)


@pytest.mark.parametrize("lines, asked", [(257, 1), (4, 1), (160, 200), (160, 0)])
def test_sizes_that_no_program_has_are_refused(lines, asked):
    with pytest.raises(UsageError, match=f"--lines {lines}, --asked {asked}: use 5 to 256 lines"):
        programs.programs(1, lines, asked, np.random.default_rng(0))


def test_grading_of_an_answer():
    program = programs.Program("0", PROGRAM, "v5 7 v0 8")
    assert programs.is_correct(ANSWER, program.answer) and programs.lines_right(ANSWER, program) == 1
    wrong = ANSWER.replace("v4 5 ; v5 v4 +2 : v4 5 v5 7", "v4 4 ; v5 v4 +2 : v4 4 v5 6").replace(
        "answer v5 7", "answer v5 6"
    )
    assert not programs.is_correct(wrong, program.answer)
    assert programs.values_right(wrong, program.answer) == 1 / 2
    assert programs.lines_right(wrong, program) == 4 / 6
    cut = ANSWER[: ANSWER.index("v4 v0")]
    assert not programs.is_correct(cut, program.answer) and programs.values_right(cut, program.answer) == 0
    assert programs.lines_right(cut, program) == 4 / 6
    assert not programs.is_correct("", program.answer) and programs.lines_right("v0 v0 v0 ; ;", program) == 0


class Interpreter:
    """An engine that executes programs, and with compression loses the last value."""

    def __init__(self, arguments, options, sampling) -> None:
        assert sampling.temperature == 0

    def answer(self, questions):
        for i, question in enumerate(questions):
            values = execute(question.prompt)
            asked = question.prompt.split(" ask ")[1].split()[:-1]
            pairs = [f"{name} {values[name]}" for name in asked]
            if question.ratio != 1.0:
                pairs[-1] = f"{asked[-1]} ?"
            yield i, Completion("answer " + " ".join(pairs), 9, "stop")

    def close(self) -> None:
        pass


def test_the_results_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "VllmEngine", Interpreter)
    monkeypatch.setattr(accuracy, "VllmEngine", Interpreter)
    monkeypatch.setattr(tracking, "check_plugin_is_loaded", lambda: None)
    chosen = cases([{"method": ["kara", "random"], "retention_ratio": [0.3]}], baselines=())
    tracking.answer(tmp_path, "small", chosen, 5, 20, 4, 1, [])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    figures = [(row["name"], row["answers"]["value"], row["values"]["value"]) for row in results]
    assert figures == [("full cache", 1.0, 1.0), ("kara", 0.0, 0.75), ("random", 0.0, 0.75)]
    assert results[1]["against_full"]["value"] == -1 and (tmp_path / "results.svg").stat().st_size > 0
    table = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    assert ["0.3", "kara", "5", "0.0 [0.0, 43.4]", "-100.0 [-100.0, -100.0]", "75.0 [75.0, 75.0]"] in [
        r[1:7] for r in table
    ]
    with pytest.raises(UsageError, match="graded by 'tracking v1', not by math-verify"):
        regrade(Path(tmp_path / "samples.jsonl"))
