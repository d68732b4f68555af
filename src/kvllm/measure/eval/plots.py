"""Plots of estimates and shares, shared by all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kvllm.measure.eval.stats import Estimate
from kvllm.measure.eval.sweep import BASELINES


@dataclass
class Panel:
    """Curves over the retention ratio, one line per name; full: the full cache's value, dashed."""

    title: str
    full: float | None = None
    curves: dict[str, list[tuple[float, Estimate]]] = field(default_factory=dict)

    def add(self, name: str, ratio: float, estimate: Estimate) -> None:
        self.curves.setdefault(name, []).append((ratio, estimate))


def panels_of(rows: Sequence[Any], full: Any, figures: Mapping[str, str]) -> list[Panel]:
    """One panel per metric, for rows with a name, a ratio and Estimates as attributes.

    full: the row of the full cache, or None; figures: attribute names by title
    """
    made = []
    for title, attribute in figures.items():
        panel = Panel(title, getattr(full, attribute).value if full else None)
        for row in rows:
            if row is not full and row.ratio is not None:
                panel.add(row.name, row.ratio, getattr(row, attribute))
        made.append(panel)
    return made


def plot_curves(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels side by side."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        draw_curves(axis, panel.curves, panel.full)
        axis.set_ylabel(panel.title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_grids(grids: Mapping[str, Mapping[tuple[int, float], float]], path: Path) -> None:
    """One heat map per title of the share recalled, distance by depth."""
    figure, axes = plt.subplots(1, len(grids), figsize=(1 + 2.6 * len(grids), 3.4), sharey=True, squeeze=False)
    for axis, (title, cells) in zip(axes[0], grids.items(), strict=True):
        distances, depths = sorted({d for d, _ in cells}), sorted({x for _, x in cells})
        shares = [[cells[d, x] for d in distances] for x in depths]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(distances)), [str(d) for d in distances])
        axis.set_yticks(range(len(depths)), [f"{x:g}" for x in depths])
        axis.set_title(title, fontsize=9)
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                axis.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=7)
    axes[0][0].set_ylabel("depth of the fact")
    figure.supxlabel("tokens between prompt and question", fontsize=9)
    figure.colorbar(image, ax=axes[0].tolist(), label="recalled")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_bins(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path) -> None:
    """One panel per title: a share by the lower bounds of bins, one line per name."""
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        firsts = sorted({first for points in lines.values() for first, _ in points})
        for name, points in lines.items():
            places = [firsts.index(first) for first, _ in points]
            axis.plot(places, [share for _, share in points], marker="o", markersize=4, label=name)
        axis.set_xticks(range(len(firsts)), [f"{first}+" for first in firsts])
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_bars_and_lines(
    lines: Mapping[str, Sequence[float]], bars: Mapping[str, Estimate], limits: Mapping[str, float], path: Path
) -> None:
    """Shares by position in the window, next to the attention that each selection covers; limits are dashed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for name, shares in lines.items():
        places = [(i + 0.5) / len(shares) for i in range(len(shares))]
        style = {"color": "black", "linestyle": "--"} if name not in bars else {}
        left.plot(places, shares, marker="o", markersize=3, label=name, **style)
    left.set_xlabel("place in the window, oldest to newest")
    left.set_ylabel("share of the weights")
    left.set_yscale("log")
    left.legend(fontsize=8)
    values = [estimate.value for estimate in bars.values()]
    errors = [[e.value - e.low for e in bars.values()], [e.high - e.value for e in bars.values()]]
    right.barh(range(len(bars)), values, xerr=errors, color="0.7")
    right.set_yticks(range(len(bars)), list(bars))
    right.invert_yaxis()
    for name, value in limits.items():
        right.axvline(value, color="black", linestyle="--" if name == "random" else ":", linewidth=1)
        right.annotate(name, (value, len(bars) - 0.55), fontsize=8, ha="right")
    right.set_xlabel("later queries' attention on the kept keys, share")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(axis: Any, curves: dict[str, list[tuple[float, Estimate]]], full: float | None) -> None:
    """Value and interval by retention ratio, one line per name."""
    for name, points in curves.items():
        points = sorted(points, key=lambda point: point[0])
        ratios = [ratio for ratio, _ in points]
        values = [e.value for _, e in points]
        errors = [[e.value - e.low for _, e in points], [e.high - e.value for _, e in points]]
        grey = {"color": "0.55", "linestyle": ":" if name == "recent" else "-."} if name in BASELINES else {}
        axis.errorbar(ratios, values, yerr=errors, label=name, marker="o", markersize=4, capsize=2, **grey)
    if full is not None:
        axis.axhline(full, color="black", linestyle="--", linewidth=1, label="full cache")
    axis.set_xlabel("retention ratio (share of a window kept)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
