from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from kvllm.errors import UsageError
from kvllm.measure.eval import traces
from kvllm.measure.eval.problems import SHIPPED, Problem, half_of, load_problems, spread
from kvllm.measure.eval.traces import Trace, make_traces, prompts_of, read_traces, write_traces
from tests.measure.commands import kvllm


def test_traces_come_back_as_they_were(tmp_path):
    traces = [Trace("math500:1", [1, 2, 3], 2), Trace("ü", [7, 8], 1)]
    write_traces(tmp_path / "t.jsonl", traces)
    assert read_traces(tmp_path / "t.jsonl") == traces
    with pytest.raises(ValueError, match="trace x: has 2 tokens, but a prompt of 2"):
        Trace("x", [1, 2], 2)


@pytest.mark.parametrize("line", [
    "{", "5", '{"id": "a"}', '{"id": "a", "token_ids": "abc", "num_prompt_tokens": 1}',
    '{"id": "a", "token_ids": [1, 2], "num_prompt_tokens": "1"}', '{"id": "a", "token_ids": 5, "num_prompt_tokens": 1}',
])  # fmt: skip
def test_a_file_of_something_else_is_refused(tmp_path, line):
    write_traces(tmp_path / "t.jsonl", [Trace("a", [1, 2], 1)])
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match=r"--traces .*t.jsonl: not a file of `kvllm eval traces` \(line 2: "):
        read_traces(tmp_path / "t.jsonl")


def test_an_empty_file_is_refused(tmp_path):
    write_traces(tmp_path / "t.jsonl", [])
    with pytest.raises(UsageError, match="t.jsonl: the file is empty; give one that `kvllm eval traces` wrote"):
        read_traces(tmp_path / "t.jsonl")


def test_the_halves_are_every_other_trace():
    traces = [Trace(str(i), [1, 2], 1) for i in range(5)]
    assert [t.id for t in half_of(traces, "train")] == ["0", "2", "4"]
    assert [t.id for t in half_of(traces, "test")] == ["1", "3"]
    assert half_of(traces, None) == traces
    with pytest.raises(ValueError, match="half='dev'"):
        half_of(traces, "dev")
    with pytest.raises(UsageError, match="--half test: is empty, since there are 1 in all; leave it out, or use more"):
        half_of(traces[:1], "test")


def test_shipped_problems_load():
    assert {name: len(load_problems(name)) for name in SHIPPED} == {"math500": 500, "gsm8k": 1319}
    assert load_problems("gsm8k")[0].answer == "18"
    for task, message in (("aime24", "not included"), ("math", "no task named 'math'")):
        with pytest.raises(ValueError, match=message):
            load_problems(task)


def test_problems_from_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "1 + 1?", "answer": 2}\n')
    assert load_problems("mine", path) == [Problem("0", "1 + 1?", "2")]
    path.write_text('{"problem": "1 + 1?"}\n')
    with pytest.raises(ValueError, match="line 1: has no answer"):
        load_problems("mine", path)


def test_spread():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), None) == spread(range(3), 9) == [0, 1, 2]
    with pytest.raises(ValueError, match="must be 1 or more"):
        spread(range(3), 0)


def test_an_installed_package_without_the_data_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(SHIPPED, "gsm8k", tmp_path / "gsm8k_test.jsonl")
    with pytest.raises(UsageError, match="not in the installed package; run from a checkout, or name gsm8k_test.jsonl"):
        load_problems("gsm8k")


def test_prompts_are_problems_or_chains_of_them():
    assert [p.id for p in prompts_of("gsm8k", None, 3, None)] == [p.id for p in spread(load_problems("gsm8k"), 3)]
    chains = prompts_of("gsm8k", None, None, 24)
    assert len(chains) == 1319 // 24 and all(len(json.loads(chain.answer)) == 24 for chain in chains)
    assert len(prompts_of("gsm8k", None, 5, 24)) == 5


class Llm:
    """Answers the first prompt with three tokens, the second with four, and so on."""

    def get_tokenizer(self):
        return self

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def generate(self, prompts, sampling):
        made = [SimpleNamespace(token_ids=[7] * len(p["prompt_token_ids"][: 3 + i])) for i, p in enumerate(prompts)]
        return [SimpleNamespace(outputs=[each]) for each in made]


def test_short_answers_are_left_out():
    problems = [Problem("a", "1 + 1?", "2"), Problem("b", "2 + 2?", "4")]
    (trace,) = make_traces(Llm(), "sums", problems, max_tokens=9, min_tokens=4, temperature=0, seed=None)
    assert trace.id == "sums:b" and trace.token_ids[trace.num_prompt_tokens :] == [7] * 4
    assert "".join(map(chr, trace.token_ids[: trace.num_prompt_tokens])) == problems[1].prompt


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`kvllm eval traces` with these options on two problems; the traces that it wrote."""
    monkeypatch.setattr(traces, "start_llm", lambda *args: Llm())
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "1 + 1?", "answer": 2}\n{"problem": "2 + 2?", "answer": 4}\n')
    out = tmp_path / "traces.jsonl"

    def run(*options: str) -> list[Trace]:
        kvllm("eval", "traces", "model", "--out", str(out), "--data", str(problems), *options)
        return read_traces(out)

    return run


def test_the_command_says_how_many_answers_were_long_enough(command, capsys):
    assert len(command("--min-tokens", "4", "--max-tokens", "9")) == 1
    said = capsys.readouterr().out
    assert said.startswith("1 of 2 answers have 4 tokens or more.") and "1 traces, 4 generated tokens" in said


def test_no_answer_of_the_length_is_an_error(command):
    with pytest.raises(UsageError, match="none of the 2 answers has --min-tokens 5; use more --problems"):
        command("--min-tokens", "5", "--max-tokens", "9")
    with pytest.raises(UsageError, match="--min-tokens 10: no answer is longer than --max-tokens 9"):
        command("--min-tokens", "10", "--max-tokens", "9")
