"""Output of results: Markdown tables, intervals, progress bars and files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvllm.measure.eval.stats import Estimate
from kvllm.measure.tables import markdown as markdown


def interval(estimate: Estimate, digits: int, scale: float = 1.0) -> str:
    value, low, high = (f"{scale * x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


class Progress:
    """A progress bar on stderr, redrawn less often if that is not a terminal; call (done, total), first with 0."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:  # not before: an error would stand behind an empty bar
            interval = 0.5 if sys.stderr.isatty() else 15.0
            self.bar = tqdm(total=total, unit=f" {self.what}", mininterval=interval, file=sys.stderr)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()


@dataclass(frozen=True)
class Outputs:
    """The files to write; None: not wanted."""

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def write(self, table: str, report: Mapping[str, Any], plot: Callable[[Path], None]) -> None:
        """Print the table, and write the table, JSON and plot."""
        if self.json:
            self.json.write_text(json.dumps(report, indent=1) + "\n")
        print(table)
        if self.markdown:
            self.markdown.write_text(table + "\n")
        if self.plot:
            plot(self.plot)
