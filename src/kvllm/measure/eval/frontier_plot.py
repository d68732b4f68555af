"""The plot of `kvllm eval frontier`: KL against bytes, legible on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kvllm.support import PLAIN_BITS

if TYPE_CHECKING:
    from kvllm.measure.eval.frontier import Point
    from kvllm.measure.eval.held_bytes import Held

GREY = "#808080"
# The palette of Okabe and Ito without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = {16: "o", 8: "s", 4: "D"}
LEAST_KL = 1e-5  # where nothing is lost


def plot_frontier(rows: Sequence[tuple[Point, Held]], title: str, path: Path) -> None:
    """One line per method, cache precision and survivor bits; a star for each cache without eviction."""
    figure, axis = plt.subplots(figsize=(9, 6))
    lines: dict[tuple[str, str, int], list[tuple[float, Any]]] = {}
    for point, size in rows:
        case = point.case
        if case.config.enabled:
            key = (case.name, case.cache, case.config.survivor_bits)
            lines.setdefault(key, []).append((size.life / 1024, point.kl()))
        else:
            _star(axis, size.life / 1024, point.kl(), case.cache)
    names = list(dict.fromkeys(name for name, _, _ in sorted(lines, key=lambda key: key[0] != "kara")))
    for (name, cache, bits), points in sorted(lines.items(), key=lambda line: (names.index(line[0][0]), line[0])):
        points.sort(key=lambda each: each[0])
        values = [max(kl.value, LEAST_KL) for _, kl in points]
        style: dict[str, Any] = {"color": COLOURS[names.index(name) % len(COLOURS)], "marker": MARKERS[bits]}
        dashes = ":" if cache != "auto" else "-" if bits < PLAIN_BITS else "--"
        style |= {"linestyle": dashes, "linewidth": 2 if name == names[0] else 1}
        label = f"{name}, {bits} bits" + ("" if cache == "auto" else f", {cache} cache")
        axis.plot([x for x, _ in points], values, label=label, markersize=5, **style)
        if name == names[0] and cache == "auto":
            low, high = ([max(getattr(kl, end), LEAST_KL) for _, kl in points] for end in ("low", "high"))
            axis.fill_between([x for x, _ in points], low, high, color=style["color"], alpha=0.12, linewidth=0)
    axis.set_yscale("log")
    axis.margins(x=0.12)
    axis.set_xlabel("KiB of KV cache a token, prompt and newest tokens included, mean over an answer's life")
    axis.set_ylabel("KL from the full cache, nats a token")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="major")
    _soften(axis)
    axis.legend(fontsize=8, ncols=2, labelcolor=GREY, framealpha=0)
    figure.tight_layout()
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def _star(axis: Any, size: float, kl: Any, cache: str) -> None:
    value = max(kl.value, LEAST_KL)
    axis.plot([size], [value], marker="*", markersize=11, color=GREY, linestyle="")
    name = f"all tokens in {cache.removesuffix('_nc')}"
    axis.annotate(name, (size, value), textcoords="offset points", xytext=(7, 4), fontsize=8, color=GREY)


def _soften(axis: Any) -> None:
    """Grey text and lines, visible on white and black pages."""
    axis.tick_params(colors=GREY, which="both")
    for part in (axis.xaxis.label, axis.yaxis.label, axis.title):
        part.set_color(GREY)
    for spine in axis.spines.values():
        spine.set_color(GREY)
