"""Parse an answer to a chain: the result of each problem, and the final list that repeats them.

Models rarely follow the format exactly, so Markdown, boxes, units and extra words are tolerated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from kvllm.measure.eval.samples import Sample

# Raised when scoring changes.
SCORE_VERSION = 1
NUMBER = r"[-\u2212]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-\u2212]?\$?\.\d+"
_MARKS = r"[ \t>*#_`-]*"  # of Markdown, before a heading or a line
_HEADING = re.compile(rf"^{_MARKS}(?:Problem|Question)\s*#?(\d+)\b(?![^\n]*Answer)", re.IGNORECASE | re.MULTILINE)
_ANSWER = re.compile(
    rf"^{_MARKS}(?:The\s+)?(?:Final\s+)?(?:Answer|Result)\s*(?:of|to|for)?\s*(?:Problem)?\s*#?(\d+)\b[*_` ]*"
    r"(?:[:=]|is\b)(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_LIST = re.compile(
    rf"^{_MARKS}(?:Here are |These are )?(?:All|The|Final|List of|Summary of)?(?: the| all| final)*\s*"
    r"(?:Answers|Results|Summary)\b[^\n\d]*:?[*_` ]*$",
    re.IGNORECASE | re.MULTILINE,
)
_ENTRY = re.compile(
    rf"(?<![\w.,$])(?:Problem|Answer|Result)?\s*#?(\d+)[*_` ]*[:.)=][*_` ]*(?:Answer|Result)?[*_`: ]*"
    rf"(?:\\boxed\{{\s*|\\\(\s*|\$\s*)*({NUMBER})",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class Stated:
    """A number in an answer. at: its offset in the text, in characters"""

    value: Decimal
    at: int


@dataclass(frozen=True)
class ChainScore:
    """Scores of one answer to a chain, by problem.

    correct:   whether the answer's result is the expected one; False if it has none
    recalled:  whether the list repeats the answer's own result, right or wrong; None if it has none
    distance:  tokens from the result to its entry in the list, or to the end of the answer if there is no entry;
               estimated from characters. None if there is no result
    finished:  whether the answer ended by itself, with a result and an entry for every problem
    """

    correct: tuple[bool, ...]
    recalled: tuple[bool | None, ...]
    distance: tuple[int | None, ...]
    finished: bool

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def recall(self) -> float:
        """Share of the answer's results that the list repeats; 0 if it has none."""
        known = [recalled for recalled in self.recalled if recalled is not None]
        return sum(known) / len(known) if known else 0.0


def score(sample: Sample, expected: Sequence[str]) -> ChainScore:
    """expected: the answers of the chain's problems"""
    text = sample.text
    results, entries = read_results(text, len(expected)), read_list(text, len(expected))
    per_character = sample.num_tokens / max(len(text), 1)
    found = [results.get(k) for k in range(1, len(expected) + 1)]
    repeated = [entries.get(k) for k in range(1, len(expected) + 1)]
    return ChainScore(
        correct=tuple(
            r is not None and r.value == number(e) for r, e in zip(found, expected, strict=True)
        ),
        recalled=tuple(
            None if r is None else e is not None and e.value == r.value for r, e in zip(found, repeated, strict=True)
        ),
        distance=tuple(
            None if r is None else round(((e.at if e else len(text)) - r.at) * per_character)
            for r, e in zip(found, repeated, strict=True)
        ),
        finished=sample.finish_reason == "stop" and None not in found and None not in repeated,
    )  # fmt: skip


def number(text: str) -> Decimal | None:
    """Parse a number with optional thousands commas, dollar or minus sign; None if it is not one."""
    try:
        return Decimal(text.replace(",", "").replace("$", "").replace("\u2212", "-").strip())
    except InvalidOperation:
        return None


def read_results(text: str, count: int) -> dict[int, Stated]:
    """The result of each problem, by its number from 1: from its answer line, else the last number of its section.

    The final list does not count as an answer. If a problem is answered twice, the first answer counts.
    """
    body = text[: _list_start(text, count)]
    results: dict[int, Stated] = {}
    for match in _ANSWER.finditer(body):
        k, value = int(match[1]), line_value(match[2])
        if value is not None and 1 <= k <= count:
            results.setdefault(k, Stated(value, match.start(2)))
    headings = list(_HEADING.finditer(body))
    for i, heading in enumerate(headings):
        k, end = int(heading[1]), headings[i + 1].start() if i + 1 < len(headings) else len(body)
        # A section in which the answer was cut off has no result.
        if not 1 <= k <= count or k in results or (i + 1 == len(headings) and end == len(text)):
            continue
        section = body[heading.end() : end]
        boxed, numbers = list(_BOXED.finditer(section)), list(re.finditer(NUMBER, section))
        last = boxed[-1] if boxed else numbers[-1] if numbers else None
        value = None if last is None else line_value(last[0])
        if last is not None and value is not None:
            results[k] = Stated(value, heading.end() + last.start())
    return results


def line_value(line: str) -> Decimal | None:
    """The number in an answer line: the boxed one, else the one after the last equals sign, else the first."""
    if boxed := _BOXED.search(line):
        line = boxed[1]
    numbers = re.findall(NUMBER, line.rpartition("=")[2]) or re.findall(NUMBER, line)
    return number(numbers[0]) if numbers else None


def read_list(text: str, count: int) -> dict[int, Stated]:
    """The entries of the final list, by problem; the first if there are two."""
    start = _list_start(text, count)
    entries: dict[int, Stated] = {}
    for match in _ENTRY.finditer(text, start):
        k, value = int(match[1]), number(match[2])
        if value is not None and 1 <= k <= count:
            entries.setdefault(k, Stated(value, match.start(2)))
    return entries


def _list_start(text: str, count: int) -> int:
    """Offset at which the list begins: at its heading, or without one, after the answer line of the last problem.

    Only a heading after the last section counts, not a "Summary:" inside a solution.
    """
    sections = [m.start() for m in _HEADING.finditer(text)]
    last = sections[-1] if sections else 0
    for match in _LIST.finditer(text, last):
        if _ENTRY.search(text, match.end()):
            return match.end()
    final = next((m for m in _ANSWER.finditer(text) if int(m[1]) == count), None)
    return final.end() if final else len(text)
