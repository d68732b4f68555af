"""Plot throughput by requests in flight (or by configuration), and step time by context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot a result of `kvllm bench throughput`, without failed rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "error" not in row]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    labels = list(dict.fromkeys(row["config"] for row in rows))
    several = len({row["concurrency"] for row in rows}) > 1
    for label in labels:
        mine = [row for row in rows if row["config"] == label]
        throughput = [row["output_tokens_per_s"] for row in mine]
        if several:
            left.plot([row["concurrency"] for row in mine], throughput, marker="o", label=label)
        else:
            left.bar(label, sum(throughput) / len(throughput))
        longest = mine[-1]["by_context"]
        right.plot([p["context"] for p in longest], [p["step_ms"] for p in longest], marker=".", label=label)
    left.set(ylabel="output tokens/s, steady state", ylim=(0, None))
    if several:
        left.set_xlabel("requests in flight")
        left.set_xscale("log", base=2)
        left.legend()
    right.set(xlabel="mean tokens of a running request", ylabel="median step, ms", ylim=(0, None))
    right.legend()
    spec = result["spec"]
    engine: dict[str, Any] = next((e for e in result["engines"] if e), {})
    figure.suptitle(
        f"{Path(spec['model']).name}, {engine.get('device')}: {spec['prompt_len']} in, {spec['output_len']} out, "
        f"pool {engine.get('num_kv_blocks')} blocks of {engine.get('block_size')}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
