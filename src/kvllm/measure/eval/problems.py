"""Problems with answers: the two sets in a checkout of the repository, or any JSONL file of the same form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from kvllm.errors import UsageError
from kvllm.measure.eval.engines import Exchange

# In a checkout; an installed package carries no data.
DATA = Path(__file__).parents[4] / "benchmarks" / "data"
SHIPPED = {"math500": DATA / "math500.jsonl", "gsm8k": DATA / "gsm8k_test.jsonl"}
NOT_SHIPPED = ("aime24", "aime25")

# Raised when the prompt or what is graded changes: figures of two versions do not compare.
PROMPT_VERSION = 1
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

HALVES = ("train", "test")

T = TypeVar("T")


class Asked(Protocol):
    """What an answer is made to: a problem, or a chain of them."""

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def examples(self) -> tuple[Exchange, ...]: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.problem}\n\n{INSTRUCTION}"

    @property
    def examples(self) -> tuple[Exchange, ...]:
        """None are shown."""
        return ()


def load_problems(task: str, data: Path | None = None) -> list[Problem]:
    """The problems of a task in `benchmarks/data`, or of the file `data` (then `task` is only a name)."""
    if data is None:
        if task in NOT_SHIPPED:
            raise UsageError(f"task {task}: its text has no open licence and does not ship; name a file with --data.")
        if task not in SHIPPED:
            raise UsageError(f"no task named {task!r}; use {', '.join(SHIPPED)}, or name a file with --data.")
        data = SHIPPED[task]
        if not data.is_file():
            raise UsageError(
                f"task {task}: its problems are in benchmarks/data of the repository, not in the installed package; "
                f"run from a checkout, or name {data.name} with --data."
            )
    problems = []
    for number, line in enumerate(data.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if missing := {"problem", "answer"} - row.keys():
            raise UsageError(f"{data}, line {number}: has no {' and no '.join(sorted(missing))}.")
        problems.append(Problem(str(row.get("id", number - 1)), row["problem"], str(row["answer"])))
    return problems


def spread(items: Sequence[T], count: int | None) -> list[T]:
    """`count` of the items, evenly spaced over all of them; None: all."""
    if count is None or count >= len(items):
        return list(items)
    if count < 1:
        raise UsageError(f"{count} of {len(items)} items: must be 1 or more.")
    return [items[i * len(items) // count] for i in range(count)]


def half_of(items: Sequence[T], half: str | None) -> list[T]:
    """train: the first, third, ... trace or problem, to tune on; test: the others, to report on; None: all."""
    if half is None:
        return list(items)
    if half not in HALVES:
        raise UsageError(f"half={half!r}: must be one of {', '.join(HALVES)}.")
    return list(items[HALVES.index(half) :: 2])
