"""Plot a run of the demo: finished and concurrent requests over time."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from kvllm.measure.demo.job import Job, Outcome


def draw(job: Job, outcomes: Mapping[str, Outcome], path: Path) -> bool:
    """Write an SVG or PNG, depending on the suffix; returns False if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvllm"  # deterministic output
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for (label, outcome), color in zip(outcomes.items(), ("#888888", "#2a9d5c"), strict=True):
        seconds = [0.0, *(s.seconds for s in outcome.history), outcome.seconds]
        finished = [0, *(s.finished for s in outcome.history), outcome.num_requests]
        left.step(seconds, finished, where="post", label=f"{label}, {outcome.per_minute:.1f} a minute", color=color)
        right.plot([s.seconds for s in outcome.history], [s.running for s in outcome.history], color=color, label=label)
    left.set(xlabel="seconds", ylabel="requests finished", ylim=(0, job.num_requests + 0.5), xlim=(0, None))
    right.set(xlabel="seconds", ylabel="requests running at once", ylim=(0, job.num_requests + 0.5), xlim=(0, None))
    left.legend(loc="upper left", frameon=False)
    figure.suptitle(
        f"{job.num_requests} answers of {job.output_len} tokens in a KV pool for {job.num_fitting} of them "
        f"({Path(job.model).name}, CPU)",
        fontsize=10,
    )
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return True
