"""Measure how compression changes the next-token distribution, by replaying traces with teacher forcing.

    kvllm eval fidelity --traces traces.jsonl --model DIR --methods kara,snapkv --ratios 0.2,0.3

Needs torch and transformers but not vLLM. The full cache is replayed once per trace; each configuration continues from
that replay's state at its own first compression, since earlier rows are identical.
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
from kvllm.layout import IntArray, RequestGeometry
from kvllm.measure.environment import environment
from kvllm.measure.eval.cache_formats import AUTO, cache_formats
from kvllm.measure.eval.forks import first_event, fork_all
from kvllm.measure.eval.plots import Panel, plot_curves
from kvllm.measure.eval.problems import half_of
from kvllm.measure.eval.report import Outputs, Progress, interval, markdown
from kvllm.measure.eval.stats import Estimate, bootstrap_ratio
from kvllm.measure.eval.sweep import Case, baseline_of
from kvllm.measure.eval.traces import Trace, read_traces
from kvllm.methods import resolved
from kvllm.reference import Replay, block_size_of, feed, kl_by_row, load_model

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

# Lower bounds of bins of rows; the last bin is open.
DISTANCES = (0, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens since the first compression
EVENTS = (1, 2, 4, 8, 16, 32)  # compressions so far
SINCE_EVENT = (0, 16, 32, 64, 128, 192)  # tokens since the latest of them


@dataclass(frozen=True)
class Rows:
    """Results of one configuration on one trace, from its first compression on. Arrays [num_rows].

    kl:          KL divergence of the compressed next-token distribution from the full cache's, in nats
    agreed:      whether both have the same most likely token
    delta_nll:   increase of the negative log-likelihood of the trace's next token
    distance:    computed tokens since the first compression
    events:      compressions so far, 1 or more; 0 for a configuration that never compresses
    since_event: computed tokens since the latest compression; -1 if there is none
    """

    kl: NDArray[np.float64]
    agreed: NDArray[np.float64]
    delta_nll: NDArray[np.float64]
    distance: IntArray
    events: IntArray
    since_event: IntArray


@dataclass
class Result:
    """A configuration's rows by trace id, for all traces that are long enough to be compressed."""

    case: Case
    rows: dict[str, Rows] = field(default_factory=dict)

    def estimate(self, name: str) -> Estimate:
        """Mean over all rows, bootstrapped over traces."""
        return bootstrap_ratio([getattr(r, name).sum() for r in self.rows.values()], self._counts())

    def against(self, other: Result) -> Estimate:
        """Mean KL relative to the other's, by paired bootstrap."""
        both = [trace for trace in self.rows if trace in other.rows]
        return bootstrap_ratio(
            [self.rows[trace].kl.sum() for trace in both], [other.rows[trace].kl.sum() for trace in both]
        )

    def binned(self, name: str, firsts: Sequence[int]) -> list[dict[str, Any]]:
        """Mean of each metric per bin over the rows of all traces; empty bins are left out.

        name: the variable to bin by: distance, events or since_event; firsts: lower bounds of the bins, the last open
        """
        place = np.concatenate([getattr(r, name) for r in self.rows.values()])
        means = []
        for low, high in zip(firsts, (*firsts[1:], np.inf), strict=True):
            inside = (place >= low) & (place < high)
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
            "by_distance": self.binned("distance", DISTANCES),
            "by_events": self.binned("events", EVENTS),
            "by_tokens_since_event": self.binned("since_event", SINCE_EVENT),
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
    """Replay every case on every trace.

    progress: called at the start and after each of the len(traces) * len(cases) replays
    Raises UsageError if a case would compress nothing.
    """
    if idle := [case.label for case in cases if not case.config.enabled and case.cache == AUTO]:
        raise UsageError(f"{', '.join(idle)}: compresses nothing, so nothing is compared; use --ratios below 1.")
    # Fail before the first replay, not after the last.
    lengths = [(trace.num_prompt_tokens, len(trace.token_ids) - 1) for trace in traces]
    if short := [c for c in cases if all(first_event(c.config, p, block_size) >= n for p, n in lengths)]:
        needed = max(min(first_event(c.config, p, block_size) - p + 2 for p, _ in lengths) for c in short)
        longest = max(n + 1 - p for p, n in lengths)
        raise UsageError(
            f"no trace is long enough to be compressed by {', '.join(c.label for c in short)}: the longest answer has "
            f"{longest} tokens, {needed} are needed; use longer traces (`kvllm eval traces --min-tokens`), or smaller "
            "windows and buffers (--common)."
        )
    results = [Result(case) for case in cases]
    progress(0, len(traces) * len(cases))
    for i, trace in enumerate(traces):
        for j, rows in enumerate(measure_trace(model, trace, cases, block_size)):
            if rows is not None:
                results[j].rows[trace.id] = rows
            progress(i * len(cases) + j + 1, len(traces) * len(cases))
    return results


def measure_trace(
    model: PreTrainedModel, trace: Trace, cases: Sequence[Case], block_size: int, packed: bool = False
) -> list[Rows | None]:
    """The rows of each case; None if the trace ends before the first compression.

    For a case that never compresses, but whose cache has another precision, rows start at the earliest first
    compression of the other cases, or at the end of the prompt if there is none.
    packed: as in `Request`
    """
    ids, num_prompt = trace.token_ids, trace.num_prompt_tokens
    firsts = [first_event(case.config, num_prompt, block_size) for case in cases]
    start = min(firsts, default=0)
    if start >= len(ids) - 1:
        if any(case.config.enabled for case in cases):
            return [None] * len(cases)
        start = num_prompt
    measured: list[Rows | None] = [None] * len(cases)
    expected: Replay | None = None
    for cache in sorted({AUTO, *(case.cache for case in cases)}, key=lambda name: name != AUTO):
        chosen = [i for i, case in enumerate(cases) if case.cache == cache]
        configs, formats = [cases[i].config for i in chosen], cache_formats(cache, model.config)
        base, parts, forks = fork_all(model, ids, num_prompt, configs, block_size, packed, formats, keep_from=start)
        whole = [i for i in chosen if not cases[i].config.enabled]
        if cache == AUTO or whole:
            replayed = joined([*parts[1:], feed(base, ids, keep_full=True)])
            expected = replayed if expected is None else expected
            for i in whole:
                measured[i] = rows_of(expected, replayed, None, num_prompt, start)
        assert expected is not None
        for j, request in forks.items():
            first, geometry = request.num_computed_tokens, request.geometry
            compressed = feed(request, ids, keep_full=True)
            measured[chosen[j]] = rows_of(rows_from(expected, first - start), compressed, geometry, num_prompt, first)
            request.layers.clear()  # free its cache
    return measured


def joined(parts: Sequence[Replay]) -> Replay:
    """Concatenate consecutive parts of one replay."""
    full = [part.full_logprobs for part in parts if part.full_logprobs is not None]
    assert len(full) == len(parts)
    logprobs, argmax = (torch.cat([getattr(part, name) for part in parts]) for name in ("logprobs", "argmax"))
    return Replay(logprobs, argmax, torch.cat(full), [])


def rows_from(replay: Replay, first: int) -> Replay:
    """The rows of a replay from row `first` on."""
    assert replay.full_logprobs is not None
    return Replay(replay.logprobs[first:], replay.argmax[first:], replay.full_logprobs[first:], [])


def rows_of(
    full: Replay, compressed: Replay, geometry: RequestGeometry | None, num_prompt_tokens: int, first: int
) -> Rows:
    """Compare two replays of the same rows, which begin at token `first`.

    geometry: of the compressed replay, whose first compression is at that token; None: it never compresses
    """
    tokens: IntArray = first + np.arange(len(full.logprobs), dtype=np.int64)
    events, since_event = np.zeros_like(tokens), np.full_like(tokens, -1)
    if geometry is not None:
        prompt = np.full_like(tokens, num_prompt_tokens)
        events = geometry.num_events(prompt, tokens)
        since_event = tokens - geometry.event_at(prompt, events - 1)
    return Rows(
        kl=kl_by_row(full, compressed).double().cpu().numpy(),
        agreed=(full.argmax == compressed.argmax).double().cpu().numpy(),
        delta_nll=(full.logprobs - compressed.logprobs).double().cpu().numpy(),
        distance=tokens - first,
        events=events,
        since_event=since_event,
    )


def random_like(result: Result, results: Sequence[Result]) -> Result | None:
    """The random baseline with the same policy, ratio and sizes."""
    wanted = baseline_of(result.case.config)
    return next((other for other in results if other.case.config == wanted), None)


def report(results: Sequence[Result], **about: Any) -> dict[str, Any]:
    """The content of the JSON file."""
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


def growth_table(results: Sequence[Result]) -> str:
    """Markdown: mean KL by number of compressions so far. The rows of a trace are not independent."""
    firsts = sorted({each["from"] for result in results for each in result.binned("events", EVENTS)})
    rows = []
    for result in results:
        kl = {each["from"]: f"{each['kl']:.4f}" for each in result.binned("events", EVENTS)}
        rows.append([result.case.label, *(kl.get(first, "") for first in firsts)])
    return markdown(["KL, compressions so far", *(f"from {first}" for first in firsts)], rows)


def panels(results: Sequence[Result]) -> list[Panel]:
    """Plot KL and top-1 agreement against the retention ratio; the full cache's are 0 and 1."""
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
    """Measure, print the table and write the files in `outputs`; folder: of the model that generated the traces."""
    traces = half_of(read_traces(traces_path), half)[:limit]
    model = load_model(folder, getattr(torch, dtype), device)
    block_size = block_size_of(model, block_size)
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
    tables = f"{table(results)}\n\n{growth_table(results)}"
    outputs.write(tables, report(results, **about), lambda path: plot_curves(panels(results), path))
    print(f"\n{len(traces)} traces, {len(cases)} configurations, {dtype} on {device}, {seconds:.0f} s")
