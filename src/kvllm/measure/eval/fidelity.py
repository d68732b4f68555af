"""How far compression moves the next-token distribution: traces replayed under teacher forcing.

    kvllm eval fidelity --traces traces.jsonl --model DIR --methods kara,snapkv --ratios 0.2,0.3

Needs torch and transformers, no vLLM. The full cache is replayed once a trace; each configuration goes on from the
state in which that replay reaches its first compression, since no row before it can differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvllm.errors import UsageError
from kvllm.layout import IntArray
from kvllm.measure.environment import environment
from kvllm.measure.eval.forks import first_event, fork_all
from kvllm.measure.eval.plots import Panel, plot_curves
from kvllm.measure.eval.report import Outputs, Progress, interval, markdown
from kvllm.measure.eval.stats import Estimate, bootstrap_ratio
from kvllm.measure.eval.sweep import Case, baseline_of
from kvllm.measure.eval.traces import Trace, half_of, read_traces
from kvllm.methods import resolved
from kvllm.reference import Replay, feed, kl_by_row, load_model

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

# Rows by their distance from the first compression; the last bin is open.
DISTANCES = (0, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Rows:
    """One configuration on one trace, from its first compression on. Arrays [num_rows].

    kl:        of the compressed next-token distribution from the full one, in nats
    agreed:    whether both name the same token as the most likely
    delta_nll: rise of the negative log-likelihood of the token that follows
    distance:  computed tokens since the first compression
    """

    kl: NDArray[np.float64]
    agreed: NDArray[np.float64]
    delta_nll: NDArray[np.float64]
    distance: IntArray


@dataclass
class Result:
    """A configuration's rows on every trace that is long enough to be compressed, by trace id."""

    case: Case
    rows: dict[str, Rows] = field(default_factory=dict)

    def estimate(self, name: str) -> Estimate:
        """Mean over all rows; traces are what is resampled."""
        return bootstrap_ratio([getattr(r, name).sum() for r in self.rows.values()], self._counts())

    def against(self, other: Result) -> Estimate:
        """Mean KL as a share of the other's, resampled in pairs."""
        both = [trace for trace in self.rows if trace in other.rows]
        return bootstrap_ratio(
            [self.rows[trace].kl.sum() for trace in both], [other.rows[trace].kl.sum() for trace in both]
        )

    def by_distance(self) -> list[dict[str, Any]]:
        """Mean of each figure over the rows of a bin, all traces together; empty bins are left out."""
        distance = np.concatenate([r.distance for r in self.rows.values()])
        means = []
        for low, high in zip(DISTANCES, (*DISTANCES[1:], np.inf), strict=True):
            inside = (distance >= low) & (distance < high)
            if inside.any():
                figures = {
                    name: float(np.concatenate([getattr(r, name) for r in self.rows.values()])[inside].mean())
                    for name in ("kl", "agreed", "delta_nll")
                }
                means.append({"from": low, "num_rows": int(inside.sum()), **figures})
        return means

    def _counts(self) -> list[int]:
        return [len(r.kl) for r in self.rows.values()]

    def to_dict(self, random: Result | None) -> dict[str, Any]:
        return {
            "name": self.case.name,
            "config": resolved(self.case.config),
            "kl": asdict(self.estimate("kl")),
            "top1_agreement": asdict(self.estimate("agreed")),
            "delta_nll": asdict(self.estimate("delta_nll")),
            "kl_against_random": asdict(self.against(random)) if random else None,
            "by_distance": self.by_distance(),
            "traces": {
                trace: {
                    "num_rows": len(r.kl),
                    "kl": float(r.kl.mean()),
                    "top1_agreement": float(r.agreed.mean()),
                    "delta_nll": float(r.delta_nll.mean()),
                }
                for trace, r in self.rows.items()
            },
        }


def measure(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    cases: Sequence[Case],
    block_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Every case on every trace; progress is told after each of the len(traces) * len(cases) replays."""
    # Before the first of many replays, not after the last.
    lengths = [(trace.num_prompt_tokens, len(trace.token_ids) - 1) for trace in traces]
    if short := [c.label for c in cases if all(first_event(c.config, p, block_size) >= n for p, n in lengths)]:
        raise UsageError(f"no trace is long enough to be compressed by {', '.join(short)}; use longer traces.")
    results = [Result(case) for case in cases]
    for i, trace in enumerate(traces):
        for j, rows in enumerate(measure_trace(model, trace, cases, block_size)):
            if rows is not None:
                results[j].rows[trace.id] = rows
            progress(i * len(cases) + j + 1, len(traces) * len(cases))
    return results


def measure_trace(model: PreTrainedModel, trace: Trace, cases: Sequence[Case], block_size: int) -> list[Rows | None]:
    """The rows of each case; None where the trace ends before the first compression."""
    configs = [case.config for case in cases]
    full, parts, forks = fork_all(model, trace.token_ids, trace.num_prompt_tokens, configs, block_size)
    measured: list[Rows | None] = [None] * len(cases)
    if not forks:
        return measured
    parts.append(feed(full, trace.token_ids, keep_full=True))
    logprobs = torch.cat([part.logprobs for part in parts])
    argmax = torch.cat([part.argmax for part in parts])
    full_logprobs = torch.cat([part.full_logprobs for part in parts if part.full_logprobs is not None])
    before = len(logprobs) - len(full_logprobs)
    for i, request in forks.items():
        first = request.num_computed_tokens
        expected = Replay(logprobs[first:], argmax[first:], full_logprobs[first - before :], [])
        measured[i] = rows_of(expected, feed(request, trace.token_ids, keep_full=True))
        request.layers.clear()  # its cache is not needed any more
    return measured


def rows_of(full: Replay, compressed: Replay) -> Rows:
    """Compare two replays of the same rows, the first of which is that of the first compression."""
    return Rows(
        kl=kl_by_row(full, compressed).double().cpu().numpy(),
        agreed=(full.argmax == compressed.argmax).double().cpu().numpy(),
        delta_nll=(full.logprobs - compressed.logprobs).double().cpu().numpy(),
        distance=np.arange(len(full.logprobs)),
    )


def random_like(result: Result, results: Sequence[Result]) -> Result | None:
    """The random baseline of the same policy, ratio and sizes."""
    wanted = baseline_of(result.case.config)
    return next((other for other in results if other.case.config == wanted), None)


def report(results: Sequence[Result], **about: Any) -> dict[str, Any]:
    """What is written as JSON."""
    return {
        "task": "fidelity",
        **environment(),
        **about,
        "results": [result.to_dict(random_like(result, results)) for result in results],
    }


def table(results: Sequence[Result]) -> str:
    """Markdown, best first within each ratio."""
    rows = []
    for result in sorted(results, key=lambda r: (r.case.config.mean_ratio, r.estimate("kl").value)):
        random = random_like(result, results)
        rows.append(
            [
                f"{result.case.config.mean_ratio:g}",
                result.case.name,
                interval(result.estimate("kl"), 4),
                interval(result.against(random), 2) if random else "",
                interval(result.estimate("agreed"), 2, scale=100),
                interval(result.estimate("delta_nll"), 4),
            ]
        )
    return markdown(["ratio", "method", "KL", "KL / random's", "top-1 %", "delta NLL"], rows)


def panels(results: Sequence[Result]) -> list[Panel]:
    """KL and top-1 agreement against the share kept; the full cache's are 0 and 1."""
    made = [Panel("KL from the full cache, nats", 0.0), Panel("same most likely token, share", 1.0)]
    for result in results:
        for panel, name in zip(made, ("kl", "agreed"), strict=True):
            panel.add(result.case.name, result.case.config.mean_ratio, result.estimate(name))
    return made


def run(
    traces_path: Path,
    folder: str,
    cases: Sequence[Case],
    half: str | None,
    limit: int | None,
    block_size: int,
    device: str,
    dtype: str,
    outputs: Outputs,
) -> None:
    """Measure, print the table and write what `outputs` asks for; folder: of the model that wrote the traces."""
    traces = half_of(read_traces(traces_path), half)[:limit]
    model = load_model(folder, getattr(torch, dtype), device)
    start = time.perf_counter()
    results = measure(model, traces, cases, block_size, Progress("replays"))
    seconds = time.perf_counter() - start
    about = {
        "model": Path(folder).name,
        "traces": traces_path.name,
        "half": half,
        "num_traces": len(traces),
        "block_size": block_size,
        "dtype": dtype,
        "seconds": seconds,
    }
    outputs.write(table(results), report(results, **about), lambda path: plot_curves(panels(results), path))
    print(f"\n{len(traces)} traces, {len(cases)} configurations, {dtype} on {device}, {seconds:.0f} s")
