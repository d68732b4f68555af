"""The log of a run: all questions and answers, so that they can be graded again and an interrupted run continued."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Sample:
    """One answer to one problem.

    name:       the configuration's label in tables
    config:     fields of KvConfig; None: the full cache, or an endpoint's own configuration
    ratio:      1.0 for the full cache; None: the endpoint's default
    correct:    None: not graded yet
    """

    task: str
    problem_id: str
    sample: int
    name: str
    config: Mapping[str, Any] | None
    ratio: float | None
    expected: str
    text: str
    num_tokens: int
    finish_reason: str
    correct: bool | None = None
    grader: str | None = None

    @property
    def key(self) -> str:
        """Identifies the answer; a continued run skips the keys in its log."""
        return sample_key(self.task, self.problem_id, self.sample, self.config, self.ratio)


def sample_key(task: str, problem_id: str, sample: int, config: Mapping[str, Any] | None, ratio: float | None) -> str:
    return json.dumps([task, problem_id, sample, config, ratio], sort_keys=True)


def write_sample(log: TextIO, sample: Sample) -> None:
    """Append one line and flush it, so that a kill loses at most this line."""
    log.write(json.dumps(asdict(sample)) + "\n")
    log.flush()


def without_cut_line(content: bytes) -> bytes:
    """The content of a JSONL log, each line ended; an incomplete last line, as left by a kill, is left out."""
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return content
    try:
        json.loads(content[whole:])
    except ValueError:
        return content[:whole]
    return content + b"\n"


def read_samples(path: Path) -> list[Sample]:
    """All complete lines of the log; an incomplete last line is removed from the file."""
    content = path.read_bytes()
    whole = without_cut_line(content)
    if whole != content:
        path.write_bytes(whole)
    return [Sample(**json.loads(line)) for line in whole.splitlines()]


def regrade(path: Path) -> list[Sample]:
    """Grade every answer of the log again and replace the log."""
    from kvllm.measure.eval.grade import GRADER, is_correct

    samples = [replace(s, correct=is_correct(s.text, s.expected), grader=GRADER) for s in read_samples(path)]
    replace_log(path, samples)
    return samples


def replace_log(path: Path, samples: Iterable[Sample]) -> None:
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    new.replace(path)
