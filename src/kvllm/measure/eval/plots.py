"""Plots of results. Random and recent are always in: what does not beat them is worth nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kvllm.measure.eval.stats import Estimate
from kvllm.measure.eval.sweep import BASELINES

if TYPE_CHECKING:
    from kvllm.measure.eval.accuracy import Summary
    from kvllm.measure.eval.fidelity import Result
    from kvllm.measure.eval.recall import Answer


def plot_fidelity(results: Sequence[Result], path: Path) -> None:
    """KL and top-1 agreement against the share kept, one line a method; the full cache dashed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for axis, name, title, full in (
        (axes[0], "kl", "KL from the full cache, nats", 0.0),
        (axes[1], "agreed", "same most likely token, share", 1.0),
    ):
        curves: dict[str, list[tuple[float, Estimate]]] = {}
        for result in results:
            curves.setdefault(result.case.name, []).append((result.case.config.retention_ratio, result.estimate(name)))
        draw_curves(axis, curves, full)
        axis.set_ylabel(title)
    save(figure, path)


def plot_accuracy(summaries: Sequence[Summary], path: Path) -> None:
    """Accuracy and length of the answers against the share kept; the full cache dashed."""
    from kvllm.measure.eval.samples import FULL

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    full = next((s for s in summaries if s.name == FULL), None)
    for axis, name, title in ((axes[0], "accuracy", "accuracy"), (axes[1], "mean_tokens", "mean tokens an answer")):
        curves: dict[str, list[tuple[float, Estimate]]] = {}
        for s in summaries:
            if s is not full and s.ratio is not None:
                curves.setdefault(s.name, []).append((s.ratio, getattr(s, name)))
        draw_curves(axis, curves, getattr(full, name).value if full else None)
        axis.set_ylabel(title)
    save(figure, path)


def plot_recall(answers: Mapping[str, Sequence[Answer]], path: Path) -> None:
    """A heat map a method: distance across, depth down."""
    from kvllm.measure.eval.recall import accuracy, grid

    figure, axes = plt.subplots(1, len(answers), figsize=(1 + 2.6 * len(answers), 3.4), sharey=True, squeeze=False)
    for axis, (label, given) in zip(axes[0], answers.items(), strict=True):
        cells = grid(given)
        distances, depths = sorted({d for d, _ in cells}), sorted({x for _, x in cells})
        shares = [[cells[d, x] for d in distances] for x in depths]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(distances)), [str(d) for d in distances])
        axis.set_yticks(range(len(depths)), [f"{x:g}" for x in depths])
        axis.set_title(f"{label}: {accuracy(given).value:.0%}", fontsize=9)
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                axis.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=7)
    axes[0][0].set_ylabel("depth of the fact")
    figure.supxlabel("tokens between prompt and question", fontsize=9)
    figure.colorbar(image, ax=axes[0].tolist(), label="recalled")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_curves(axis: Any, curves: dict[str, list[tuple[float, Estimate]]], full: float | None) -> None:
    """Value and interval by retention ratio, one line a name."""
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


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
