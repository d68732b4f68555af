"""Compare how well bidirectional and causal attention weights predict the attention of later queries.

    kvllm eval attention --traces traces.jsonl --model DIR --plot attention.svg

As in figure 3 of the Kara paper (arXiv:2607.01237), for every window of the traces: how much attention each position
in the window gets from the stored queries, with and without a causal mask, and how much of the attention that queries
after the compression pay to the window falls on the keys that each variant would keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.measure.environment import environment
from kvllm.measure.eval.forks import first_event
from kvllm.measure.eval.problems import half_of
from kvllm.measure.eval.report import Outputs, Progress, interval, markdown
from kvllm.measure.eval.stats import Estimate, bootstrap_mean
from kvllm.measure.eval.traces import Trace, read_traces
from kvllm.methods.base import Kept, Method, Window, top_k
from kvllm.methods.kara import Kara, attention_moment
from kvllm.reference import Request, block_size_of, feed, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[[Window], Tensor]
SCORES: Mapping[str, Score] = {
    "bidirectional": lambda window: attention_moment(window, "mean"),
    "causal": lambda window: attention_moment(window, "mean", bidirectional=False),
    "bidirectional, ahead": lambda window: attention_moment(Kara().ahead(window), "mean"),
    "causal, unnormalised": lambda window: accumulated(window),
    "kara": lambda window: Kara().score(window),
}
PLACES = 16  # of a window, for the means by place


def accumulated(window: Window) -> Tensor:
    """Causal weights summed over the queries (H2O), which favours old keys, as more queries attend to them."""
    return attention_moment(window, "mean", bidirectional=False) * seen_by(window)


def seen_by(window: Window) -> Tensor:
    """[num_tokens]: number of queries at or after each key."""
    indices = torch.arange(window.num_tokens, device=window.keys.device)
    return (indices <= window.head_query_positions.unsqueeze(-1)).sum(dim=(0, 1))


@dataclass
class WindowFigures:
    """Results for one window, averaged over all layers and heads.

    covered: share of the later queries' attention to the window that falls on the keys with the highest scores
    best:    the same for the keys with the most of that attention; even: for as many random keys
    weights: [PLACES] share of the scores by position in the window; `later`: of the later queries' attention
    earlier: share of the bidirectional weights that come from queries before the key
    """

    covered: dict[str, float]
    best: float
    even: float
    weights: dict[str, list[float]]
    later: list[float]
    earlier: float


class Listener(Method):
    """Kara, but recording every window that it is given."""

    def __init__(self) -> None:
        self.windows: list[tuple[Window, int]] = []

    @property
    def uses_rope(self) -> bool:
        return True

    def score(self, window: Window) -> Tensor:
        return Kara().score(window)

    def compress(self, window: Window, num_kept: int) -> Kept:
        self.windows.append((window, num_kept))
        return Kept(self.select(self.score(window), num_kept))


def measure_trace(
    model: PreTrainedModel, trace: Trace, config: KvConfig, block_size: int, later_tokens: int
) -> list[WindowFigures]:
    """Results for every window of a text from which nothing is evicted: each is scored as if it were the first one.

    later_tokens: number of tokens after the compression whose queries are used
    """
    full = Request(model, trace.num_prompt_tokens, max_queries=len(trace.token_ids))
    feed(full, trace.token_ids)
    figures = []
    end = first_event(config, trace.num_prompt_tokens, block_size)
    while end + later_tokens <= full.num_computed_tokens:
        start = end - config.buffer_size - config.window_size
        window, num_kept = window_at(full, start, end, config, block_size)
        later = later_attention(full, start, config.window_size, range(end, end + later_tokens))
        figures.append(window_figures(window, num_kept, later))
        end += config.window_size
    return figures


def window_at(full: Request, start: int, end: int, config: KvConfig, block_size: int) -> tuple[Window, int]:
    """The method's input for the window that begins at token `start`, once `end` tokens are computed."""
    request = Request(full.model, start, config, block_size)
    listener = request.method = Listener()
    for layer, whole in zip(request.layers, full.layers, strict=True):
        layer.keys, layer.values = whole.keys[:end], whole.values[:end]
        layer.queries = whole.queries[max(0, end - config.query_span) : end]
        layer.num_appended = end
    request.num_computed_tokens = end
    with torch.inference_mode():
        request.compress_if_due()
    ((window, num_kept),) = listener.windows
    return window, num_kept


def later_attention(full: Request, start: int, size: int, asking: range) -> Tensor:
    """[num_layers, num_kv_heads, size]: mean attention weight of the queries of `asking` to each key of the window."""
    weights = []
    for layer in full.compressed:
        queries = layer.queries[asking.start : asking.stop].float().unflatten(1, (layer.keys.shape[1], -1))
        logits = torch.einsum("qhgd,thd->hgqt", queries, layer.keys[: asking.stop].float()) * queries.shape[-1] ** -0.5
        places = torch.arange(asking.stop, device=logits.device)
        seen = places <= torch.arange(asking.start, asking.stop, device=logits.device)[:, None]
        attention = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        weights.append(attention[..., start : start + size].mean(dim=(1, 2)))
    return torch.stack(weights)


def window_figures(window: Window, num_kept: int, later: Tensor) -> WindowFigures:
    """later: as of `later_attention`"""
    total = later.sum(-1).clamp(min=1e-12)

    def covered(scores: Tensor) -> float:
        return float((later.gather(-1, top_k(scores, num_kept)).sum(-1) / total).mean())

    scores = {name: score(window) for name, score in SCORES.items()}
    both = scores["bidirectional"]
    indices = torch.arange(window.num_tokens, device=both.device)
    before = indices > window.head_query_positions.unsqueeze(-1)  # [group_size, num_queries, num_tokens]
    weights = window.logits().softmax(dim=-1)
    return WindowFigures(
        covered={name: covered(each) for name, each in scores.items()},
        best=covered(later),
        even=num_kept / window.num_tokens,
        weights={name: by_place(each) for name, each in scores.items()},
        later=by_place(later),
        earlier=float((weights * before).sum() / weights.sum()),
    )


def by_place(scores: Tensor) -> list[float]:
    """[PLACES]: share of the scores by position, averaged over heads; scores: [num_layers, num_kv_heads, num_tokens]"""
    shares = scores / scores.sum(-1, keepdim=True).clamp(min=1e-12)
    return [float(part.sum(-1).mean()) for part in shares.tensor_split(PLACES, dim=-1)]


@dataclass
class Result:
    """Results of every window, by trace id."""

    windows: dict[str, list[WindowFigures]] = field(default_factory=dict)

    def covered(self, name: str) -> Estimate:
        """Mean over the windows of a trace, bootstrapped over traces."""
        return bootstrap_mean([np.mean([w.covered[name] for w in made]) for made in self.windows.values()])

    def weights(self) -> dict[str, list[float]]:
        """Mean attention share per position in the window, by scoring queries."""
        windows = [w for made in self.windows.values() for w in made]
        return {name: np.mean([w.weights[name] for w in windows], axis=0).tolist() for name in SCORES}

    def mean(self, figure: Callable[[WindowFigures], Any]) -> Any:
        return np.mean([figure(w) for made in self.windows.values() for w in made], axis=0).tolist()


def measure(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    config: KvConfig,
    block_size: int = 16,
    later_tokens: int = 256,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    result = Result()
    progress(0, len(traces))
    for i, trace in enumerate(traces, start=1):
        if made := measure_trace(model, trace, config, block_size, later_tokens):
            result.windows[trace.id] = made
        progress(i, len(traces))
    if not result.windows:
        raise UsageError(f"no trace has a window and {later_tokens} tokens after its compression; use longer traces.")
    return result


def table(result: Result) -> str:
    rows = [[name, interval(result.covered(name), 1, scale=100)] for name in SCORES]
    rows = sorted(rows, key=lambda row: -float(row[1].split()[0]))
    best, even = result.mean(lambda w: w.best), result.mean(lambda w: w.even)
    rows = [["the best choice", f"{100 * best:.1f}"], *rows, ["random", f"{100 * even:.1f}"]]
    earlier = result.mean(lambda w: w.earlier)
    return (
        markdown(["keys with the highest", "attention of later queries that they get, %"], rows)
        + f"\n\n{100 * earlier:.0f}% of the bidirectional weights come from queries before the key."
    )


def report(result: Result, **about: Any) -> dict[str, Any]:
    return {
        "task": "attention",
        **environment(),
        **about,
        "covered": {name: asdict(result.covered(name)) for name in SCORES},
        "best": result.mean(lambda w: w.best),
        "even": result.mean(lambda w: w.even),
        "earlier": result.mean(lambda w: w.earlier),
        "by_place": result.weights(),
        "later_by_place": result.mean(lambda w: w.later),
        "traces": {trace: [asdict(w) for w in made] for trace, made in result.windows.items()},
    }


def plot(result: Result, path: Path) -> None:
    """Plot weights by position in the window, and the attention that each selection covers."""
    from kvllm.measure.eval.plots import plot_bars_and_lines

    lines = {**result.weights(), "later queries": result.mean(lambda w: w.later)}
    bars = {name: result.covered(name) for name in SCORES}
    limits = {"best choice": result.mean(lambda w: w.best), "random": result.mean(lambda w: w.even)}
    plot_bars_and_lines(lines, bars, limits, path)


def run(
    traces_path: Path,
    folder: str,
    config: KvConfig,
    half: str | None,
    limit: int | None,
    later_tokens: int,
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
    result = measure(model, traces, config, block_size, later_tokens, Progress("traces"))
    about = {
        "model": Path(folder).name,
        "traces_file": traces_path.name,
        "half": half,
        "config": config.to_dict(),
        "later_tokens": later_tokens,
        "dtype": dtype,
        "seconds": time.perf_counter() - start,
    }
    outputs.write(table(result), report(result, **about), lambda path: plot(result, path))
