"""Problems with answers: the two sets in a checkout of the repository, or any JSONL file in the same format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from kvllm.errors import UsageError
from kvllm.measure.eval.engines import Exchange

# Only in a checkout; the package contains no data.
DATA = Path(__file__).parents[4] / "benchmarks" / "data"
SHIPPED = {"math500": DATA / "math500.jsonl", "gsm8k": DATA / "gsm8k_test.jsonl"}
NOT_SHIPPED = ("aime24", "aime25")

# Incremented when the prompt or the grading changes: results of different versions are not comparable.
PROMPT_VERSION = 1
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

HALVES = ("train", "test")

T = TypeVar("T")


class Asked(Protocol):
    """A question to answer: a problem, or a chain of problems."""

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
    """The problems of a task in `benchmarks/data`, or of the file `data` (`task` is then only a name)."""
    if data is None:
        if task in NOT_SHIPPED:
            raise UsageError(f"task {task}: not included, since its text has no open licence; name a file with --data.")
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
        raise UsageError(f"--problems {count} (of {len(items)}): must be 1 or more.")
    return [items[i * len(items) // count] for i in range(count)]


def half_of(items: Sequence[T], half: str | None) -> list[T]:
    """One half of the items. train: the first, third, ..., to tune on; test: the others, to report on; None: all."""
    if half is None:
        return list(items)
    if half not in HALVES:
        raise UsageError(f"half={half!r}: must be one of {', '.join(HALVES)}.")
    chosen = list(items[HALVES.index(half) :: 2])
    if not chosen:
        raise UsageError(f"--half {half}: is empty, since there are {len(items)} in all; leave it out, or use more.")
    return chosen
