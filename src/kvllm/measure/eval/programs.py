"""Programs to execute step by step, for which the answer needs its own earlier results.

    v0 7 +1 ; v1 v0 -3 ; v2 v0 +2 ; ask v1 v2 run

Here v1 is v0 minus 3. The answer repeats each line with the value of its operand, looked up in the answer so far, and
the result, and ends with the requested values:

    v0 7 +1 : 7 7 v0 8 ; v1 v0 -3 : v0 8 v1 5 ; v2 v0 +2 : v0 8 v2 0 ; answer v1 5 v2 0

Values are modulo 10. Results appear only in the answer, so an evicted one cannot be recovered from the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvllm.errors import UsageError
from kvllm.measure.eval.problems import Problem

# Incremented when programs change: results of different versions are not comparable.
PROGRAMS_VERSION = 1
NUM_ROOTS = 4  # first lines, which use no variable
MAX_LINES = 256
MODULUS = 10
STEP = 3  # largest number that a line adds or subtracts
PROMPT_LINE, ANSWER_LINE = 4, 9  # tokens

Ids = npt.NDArray[np.int64]

# One token per word.
PAD, END, COLON, SEMICOLON, ASK, RUN, ANSWER = range(7)
DIGITS = 7
PLUS = DIGITS + MODULUS  # "+1" and so on
MINUS = PLUS + STEP
NAMES = MINUS + STEP
VOCABULARY = (
    *("<pad>", "<end>", ":", ";", "ask", "run", "answer"),
    *(str(digit) for digit in range(MODULUS)),
    *(f"{sign}{step}" for sign in "+-" for step in range(1, STEP + 1)),
    *(f"v{n}" for n in range(MAX_LINES)),
)


@dataclass(frozen=True)
class Programs:
    """A batch of programs of one length and their answers, as token ids.

    prompts: [count, num_prompt_tokens]
    answers: [count, num_answer_tokens], with END as the last
    asked:   [count, num_asked], numbers of the requested variables
    values:  [count, num_asked], their values
    """

    prompts: Ids
    answers: Ids
    asked: Ids
    values: Ids


def programs(count: int, num_lines: int, num_asked: int, rng: np.random.Generator) -> Programs:
    """Random programs whose line n sets vn to a uniformly chosen earlier variable plus or minus a small number.

    The first `NUM_ROOTS` lines use a number instead of a variable.
    """
    if not NUM_ROOTS < num_lines <= MAX_LINES or not 0 < num_asked <= num_lines:
        raise UsageError(
            f"--lines {num_lines}, --asked {num_asked}: use {NUM_ROOTS + 1} to {MAX_LINES} lines, and ask for at most "
            "as many variables."
        )
    lines = np.arange(num_lines)
    operands = (rng.random((count, num_lines)) * lines).astype(np.int64)
    steps = rng.integers(STEP, size=(count, num_lines))
    minus = rng.random((count, num_lines)) < 0.5
    found = rng.integers(MODULUS, size=(count, num_lines))  # the operands' values: so far those of the roots
    values = np.zeros((count, num_lines), np.int64)
    every = np.arange(count)
    for n in lines:
        if n >= NUM_ROOTS:
            found[:, n] = values[every, operands[:, n]]
        values[:, n] = (found[:, n] + np.where(minus[:, n], -1, 1) * (steps[:, n] + 1)) % MODULUS

    names = np.broadcast_to(NAMES + lines, (count, num_lines))
    used = np.where(lines < NUM_ROOTS, DIGITS + found, NAMES + operands)
    statement = [names, used, np.where(minus, MINUS, PLUS) + steps]
    colon, end = np.full_like(names, COLON), np.full_like(names, SEMICOLON)
    result = [colon, used, DIGITS + found, names, DIGITS + values, end]
    asked = rng.permuted(np.broadcast_to(lines, (count, num_lines)), axis=1)[:, :num_asked]
    asked_values = np.take_along_axis(values, asked, 1)
    one = np.ones((count, 1), np.int64)
    pairs = np.stack([NAMES + asked, DIGITS + asked_values], -1).reshape(count, -1)
    return Programs(
        np.concatenate([_interleaved(*statement, end), one * ASK, NAMES + asked, one * RUN], 1),
        np.concatenate([_interleaved(*statement, *result), one * ANSWER, pairs, one * END], 1),
        asked,
        asked_values,
    )


def _interleaved(*columns: Ids) -> Ids:
    """[count, num_lines * num_columns]: the columns' tokens, line by line."""
    return np.stack(columns, axis=-1).reshape(len(columns[0]), -1)


def words(ids: npt.ArrayLike) -> str:
    return " ".join(VOCABULARY[i] for i in np.asarray(ids).tolist() if i not in (PAD, END))


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer that transformers and vLLM can load."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokens = {"eos_token": VOCABULARY[END], "pad_token": VOCABULARY[PAD]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)


@dataclass(frozen=True)
class Program(Problem):
    """A program as the whole prompt, without the instruction that other problems get."""

    @property
    def prompt(self) -> str:
        return self.problem


def problems(count: int, num_lines: int, num_asked: int, seed: int) -> list[Program]:
    """The programs as problems, whose answers are the last words, such as "v17 4 v3 9"."""
    drawn = programs(count, num_lines, num_asked, np.random.default_rng(seed))
    return [
        Program(f"{seed}/{i}", words(prompt), words(answer[-2 * num_asked - 1 :]))
        for i, (prompt, answer) in enumerate(zip(drawn.prompts, drawn.answers, strict=True))
    ]


def execute(program: str) -> dict[str, int]:
    """The value of each variable of a program, given as words."""
    values: dict[str, int] = {}
    for line in program.split(" ask ")[0].split(";"):
        if line.strip():
            name, used, step = line.split()
            values[name] = (int(values.get(used, used)) + int(step)) % MODULUS
    return values


def is_correct(text: str, expected: str) -> bool:
    """Whether an answer ends with the requested variables and their values."""
    return answered(text) == expected.split()


def answered(text: str) -> list[str]:
    """The words after the last "answer"; none if there is none."""
    return text.rpartition("answer ")[2].split() if "answer " in text else []


def values_right(text: str, expected: str) -> float:
    """Share of the requested values that are correct."""
    given, wanted = answered(text)[1::2], expected.split()[1::2]
    return sum(a == b for a, b in zip(given, wanted, strict=False)) / len(wanted)


def lines_right(text: str, program: Program) -> float:
    """Share of the program's lines whose result is correct in the answer; missing lines count as wrong."""
    written: dict[str, int] = {}
    for line in text.split("answer ")[0].split(";"):
        if len(words := line.split()) == ANSWER_LINE - 1 and words[-1].isdigit():
            written.setdefault(words[-2], int(words[-1]) % MODULUS)
    values = execute(program.problem)
    return sum(written.get(name) == value for name, value in values.items()) / len(values)
