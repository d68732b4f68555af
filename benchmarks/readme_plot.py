"""Draw the README's plot of gain and loss per setting, from the table in docs/choosing.md.

python -m benchmarks.readme_plot      writes docs/images/gain-and-loss.svg
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
TABLE, PLOT = DOCS / "choosing.md", DOCS / "images" / "gain-and-loss.svg"
OURS, RANDOM, STOCK = "#00796b", "#b0bec5", "#546e7a"


@dataclass(frozen=True)
class Setting:
    """One row of the table; None: not measured.

    size:       bytes of a compressed window relative to stock
    throughput: tokens/s relative to stock, by column heading
    kl, random: KL divergence from the full cache in nats per token, with KvLLM's and with random selection
    """

    name: str
    size: float
    kl: float
    random: float | None
    throughput: dict[str, float | None]


def settings(text: str) -> list[Setting]:
    """The rows of the table of settings in docs/choosing.md."""
    lines = [
        line for line in text[text.index("| setting | bytes of an old window") :].splitlines() if line.startswith("|")
    ]
    names = cells(lines[0])
    found = []
    for line in lines[2 : next(i for i, line in enumerate(lines) if i and "is the same as" in line)]:
        row = dict(zip(names, cells(line), strict=True))
        size, kl = number(row["bytes of an old window"]), number(row["KL to the full cache"])
        assert size is not None and kl is not None, line
        name = re.sub(r".*`--(?:compression )?(.*?)`.*", r"\1", row["setting"]).replace("retention-ratio", "ratio")
        throughput = {n: number(row[n]) for n in names if "outputs" in n}
        found.append(Setting(name, size, kl, number(row["random survivors, same bytes"]), throughput))
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def number(cell: str) -> float | None:
    match = re.match(r"\**(\d+\.?\d*)", cell)
    return float(match[1]) if match else None


def draw(rows: list[Setting], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"})
    figure, (gain, loss) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    columns = list(rows[0].throughput)
    compressed = sorted((row for row in rows if row.size < 1), key=lambda row: row.size)
    measured = [row for row in rows if any(row.throughput.values())]
    labels = [f"{row.name}\n{row.size:g}" for row in measured]
    width = 0.8 / len(columns)
    for i, column in enumerate(columns):
        places = [x + (i - (len(columns) - 1) / 2) * width for x in range(len(measured))]
        heights = [row.throughput[column] or 0.0 for row in measured]
        shade = OURS if i else "#4db6ac"
        bars = gain.bar(places, heights, width, color=[STOCK if row.size == 1 else shade for row in measured])
        gain.bar_label(bars, [f"{h:g}" if h else "" for h in heights], padding=2, fontsize=10)
        gain.bar(0, 0, color=shade, label=column.removeprefix("throughput, "))
    gain.set_xticks(range(len(measured)), labels)
    gain.set_title("Throughput, multiple of stock vLLM", loc="left", fontsize=12)
    gain.legend(frameon=False, loc="upper left")
    gain.set_ylim(0, 1.15 * max(h or 0 for row in rows for h in row.throughput.values()))
    gain.set_xlabel("setting, and bytes of an old window as a share of stock's")

    for label, color, marker, points in (
        (
            "random tokens, same bytes",
            RANDOM,
            "s",
            [(r.size, r.random, "") for r in compressed if r.random is not None],
        ),
        ("KvLLM", OURS, "o", [(r.size, r.kl, r.name) for r in compressed if r.random is not None]),
        (
            "KvLLM, 16 bits (the default)",
            "#ef6c00",
            "D",
            [(r.size, r.kl, r.name) for r in compressed if r.random is None],
        ),
    ):
        loss.plot([p[0] for p in points], [p[1] for p in points], marker=marker, color=color, label=label)
        for size, kl, name in points:
            loss.annotate(name, (size, kl), textcoords="offset points", xytext=(7, 5), fontsize=10)
    loss.set_xscale("log", base=2)
    sizes = [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    loss.set_xticks(sizes, [f"1/{round(1 / size)}" for size in sizes])
    loss.set_xlim(1 / 18, 0.55)
    loss.set_ylim(0, None)
    loss.set_title("Distance from the full cache (KL, nats per token)", loc="left", fontsize=12)
    loss.set_xlabel("bytes of an old window, share of stock's")
    loss.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(settings(TABLE.read_text()), PLOT)
