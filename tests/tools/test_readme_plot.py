"""The plot of the README has the figures of docs/choosing.md."""

from __future__ import annotations

from pathlib import Path

from benchmarks.readme_plot import TABLE, draw, settings


def test_the_plot_is_made_of_the_table(tmp_path: Path) -> None:
    rows = {row.name: row for row in settings(TABLE.read_text())}
    assert {"stock vLLM", "4x", "8x", "16x"} <= set(rows)
    assert rows["stock vLLM"].size == 1 and rows["8x"].size == 0.125
    assert rows["8x"].random and rows["8x"].kl < rows["8x"].random
    draw(list(rows.values()), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
