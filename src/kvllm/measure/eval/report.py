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
    """A progress bar on stderr, redrawn less often if that is not a terminal; call it with (done, total)."""

    def __init__(self, what: str) -> None:
        self.bar: Any = tqdm(unit=f" {what}", mininterval=0.5 if sys.stderr.isatty() else 15.0, file=sys.stderr)

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
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
