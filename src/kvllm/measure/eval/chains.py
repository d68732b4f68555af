"""Chains: prompts with many problems, solved one after another in a single answer that repeats all results at the end.

The problems are in the prompt, which is never compressed, but the results are only in the answer's own windows. So the
list at the end tests recall of facts that are thousands of tokens old.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvllm.errors import UsageError
from kvllm.measure.eval.engines import Exchange
from kvllm.measure.eval.problems import Problem, half_of

# Incremented when the prompt changes: results of different versions are not comparable.
CHAIN_VERSION = 1
LIST_HEADING = "All answers:"
RULES = (
    "Solve the following {count} problems one after the other, in order, without skipping any. For each problem write "
    "the heading `### Problem k`, reason step by step in full sentences, and end with the line `Answer k: ` followed "
    f"by the number alone. After the last problem write the line `{LIST_HEADING}` and repeat the answers that you "
    "found, one line `k: number` for each of the {count} problems."
)
FORMATS = ("example", "rules", "restate")


@dataclass(frozen=True)
class Worked:
    """A problem of the worked example and its solution. given: the problem's facts, restated"""

    problem: str
    given: str
    steps: str
    answer: int


# Written for this task; none of them is in GSM8K.
WORKED = (
    Worked(
        "A bakery bakes 14 trays of rolls in the morning, 12 rolls on each tray. By noon 98 rolls are sold, and in the "
        "afternoon half of the rest. How many rolls are left in the evening?",
        "We are told that there are 14 trays with 12 rolls each, that 98 rolls are sold by noon, and that half of the "
        "rest is sold later. We want the rolls that are left in the evening.",
        "First we find how many rolls there are in the morning. There are 14 trays of 12, so 14 * 12 = 168 rolls.\n"
        "By noon 98 rolls are sold. That leaves 168 - 98 = 70 rolls.\n"
        "In the afternoon half of these are sold, which is 70 / 2 = 35 rolls.\n"
        "So 70 - 35 = 35 rolls are left in the evening.",
        35,
    ),
    Worked(
        "Mara cycles 18 km to work and the same way back, 5 days a week. Her brother cycles 46 km less a week than she "
        "does. How many kilometres do the two cycle together in a week?",
        "We are told that Mara cycles 18 km each way on 5 days a week, and that her brother cycles 46 km less than she "
        "does in a week. We want the kilometres of both together.",
        "Each day Mara cycles to work and back, which is 18 + 18 = 36 km.\n"
        "In 5 days she cycles 36 * 5 = 180 km.\n"
        "Her brother cycles 46 km less, so he cycles 180 - 46 = 134 km.\n"
        "Together they cycle 180 + 134 = 314 km in a week.",
        314,
    ),
    Worked(
        "A ticket to the zoo costs $9 for a child and $4 more for an adult. What do 2 adults and 7 children pay if "
        "they have a voucher that takes $10 off the total?",
        "We are told that a child's ticket costs $9 and an adult's $4 more, that 2 adults and 7 children come, and "
        "that a voucher takes $10 off. We want what they pay in total.",
        "An adult's ticket costs $9 + $4 = $13.\n"
        "The 2 adults cost 2 * $13 = $26.\n"
        "The 7 children cost 7 * $9 = $63.\n"
        "Without the voucher they would pay $26 + $63 = $89.\n"
        "With the voucher they pay $89 - $10 = $79.",
        79,
    ),
)


@dataclass(frozen=True)
class Chain:
    """Problems to be solved in one answer.

    format: "rules": only the rules; "example": a worked example before them; "restate": an example whose solutions
            first restate the given facts, which makes answers longer
    """

    id: str
    problems: tuple[Problem, ...]
    format: str = "example"

    @property
    def prompt(self) -> str:
        return request([problem.problem for problem in self.problems])

    @property
    def examples(self) -> tuple[Exchange, ...]:
        if self.format == "rules":
            return ()
        return (Exchange(request([w.problem for w in WORKED]), worked_answer(restated=self.format == "restate")),)

    @property
    def answer(self) -> str:
        """The expected answers, as a JSON list."""
        return json.dumps([problem.answer for problem in self.problems])


def request(problems: Sequence[str]) -> str:
    """The user's message."""
    listed = [f"Problem {k}: {' '.join(problem.split())}" for k, problem in enumerate(problems, start=1)]
    return "\n\n".join([RULES.format(count=len(problems)), *listed])


def worked_answer(restated: bool) -> str:
    """The example's answer, in the format that the rules require."""
    parts = []
    for k, worked in enumerate(WORKED, start=1):
        steps = f"{worked.given}\n{worked.steps}" if restated else worked.steps
        parts.append(f"### Problem {k}\n{steps}\nAnswer {k}: {worked.answer}")
    listed = [f"{k}: {worked.answer}" for k, worked in enumerate(WORKED, start=1)]
    return "\n\n".join([*parts, "\n".join([LIST_HEADING, *listed])])


def make_chains(
    problems: Sequence[Problem], half: str | None, num_chains: int, length: int, format: str, seed: int = 0
) -> list[Chain]:
    """Chains of `length` problems from the half; no problem repeats before all have been used."""
    if format not in FORMATS:
        raise UsageError(f"format {format!r}: must be one of {', '.join(FORMATS)}.")
    pool = half_of(problems, half)
    if not 1 <= length <= len(pool):
        raise UsageError(f"--length {length}: there are only {len(pool)} problems; use at most that many.")
    rng = random.Random(f"{seed}/{half}")
    chains: list[Chain] = []
    while len(chains) < num_chains:
        order = rng.sample(pool, len(pool))
        for start in range(0, len(order) - length + 1, length):
            taken = tuple(order[start : start + length])
            chains.append(Chain(f"{half or 'all'}/{seed}/{length}/{format}/{len(chains)}", taken, format))
    return chains[:num_chains]
