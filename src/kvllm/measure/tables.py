"""Markdown tables with aligned columns."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are never wrapped or truncated."""
    table = Table(*header, box=MARKDOWN)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=10_000, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())
