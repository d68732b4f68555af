"""How results are shown: Markdown tables, intervals, and progress with an estimate of the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from kvllm.measure.eval.stats import Estimate


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text as well."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def interval(estimate: Estimate, digits: int, scale: float = 1.0) -> str:
    value, low, high = (f"{scale * x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


class Progress:
    """One line on stderr: done, of how many, time so far and time left. Lines of their own where it is no terminal."""

    def __init__(self, what: str, every: float = 0.5) -> None:
        self.what = what
        self.start = self.shown = time.perf_counter()
        self.every = every if sys.stderr.isatty() else max(every, 15.0)

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.shown < self.every and done < total:
            return
        self.shown = now
        spent = now - self.start
        left = spent / done * (total - done) if done else 0.0
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"{done}/{total} {self.what}, {spent:.0f} s, {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)
