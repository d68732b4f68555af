"""Quality (KL, recall) against KV cache size, for settings of all sizes and for vLLM's own cache precisions.

    kvllm eval frontier --traces traces.jsonl --model DIR --log frontier.jsonl --json out.json --plot out.svg

The log has one line per finished trace or recall text; a run continues from an existing log. Table, JSON and plot show
all settings in the log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvllm.compression.footprint import head_dim_of
from kvllm.compression.rounding import packed_block_tokens
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.measure.environment import environment
from kvllm.measure.eval import fidelity, recall
from kvllm.measure.eval.cache_formats import AUTO, CACHE_DTYPES
from kvllm.measure.eval.frontier_plot import plot_frontier
from kvllm.measure.eval.held_bytes import Held, full_bytes, geometry_of, held_bytes
from kvllm.measure.eval.problems import half_of
from kvllm.measure.eval.report import Outputs, Progress, interval, markdown
from kvllm.measure.eval.samples import without_cut_line
from kvllm.measure.eval.stats import Estimate, bootstrap_ratio, wilson
from kvllm.measure.eval.sweep import Case, baseline_of
from kvllm.measure.eval.traces import Trace, read_traces
from kvllm.methods import checked_config, resolved
from kvllm.reference import block_size_of, load_model
from kvllm.support import PLAIN_BITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE = KvConfig(retention_ratio=1.0)
RUN, TRACE, RECALL = "run", "trace", "recall"  # kinds of lines


def grid(
    methods: Sequence[str],
    caches: Sequence[str],
    bits: Sequence[int],
    sizes: Sequence[float],
    block_size: int,
    head_dim: int,
    common: dict[str, Any],
) -> list[Case]:
    """The settings to compare: methods, precisions of the cache and of survivors, and sizes of a compressed window.

    sizes: bytes of a compressed window relative to 16 bits uncompressed; sizes that do not fit a window are left out
    Every precision is also measured without eviction, and the first method and random also at the default ratio. Other
    methods are measured only in caches of the model's own dtype. TurboQuant caches are not compressed.
    """
    if unknown := [name for name in caches if name not in CACHE_DTYPES]:
        raise UsageError(f"--caches {', '.join(unknown)}: use {', '.join(CACHE_DTYPES)}.")
    found = [Case("whole cache", WHOLE, cache) for cache in caches if cache != AUTO]
    for method in methods:
        for cache in [c for c in caches if c == AUTO or (method == methods[0] and not c.startswith("turboquant"))]:
            default = checked_config({**common, "method": method})
            chosen = [default] if method in (methods[0], "random") else []
            for each in bits:
                for ratio in ratios(each, sizes, cache, default.window_size, block_size, head_dim):
                    options = {**common, "method": method, "survivor_bits": each, "retention_ratio": ratio}
                    chosen.append(checked_config(options))
            found += [Case(method, with_few_queries(config), cache) for config in chosen]
    return list({key_of(case): case for case in found}.values())


def with_few_queries(config: KvConfig) -> KvConfig:
    """The random baseline; it uses no queries, so it stores few."""
    return baseline_of(config) if config.method == "random" else config


def ratios(
    bits: int, sizes: Sequence[float], cache: str, window_size: int, block_size: int, head_dim: int
) -> Iterator[float]:
    """The retention ratios at which a compressed window takes these shares of its uncompressed bytes in 16 bits."""
    packed = packed_block_tokens(block_size, head_dim, bits) if bits < PLAIN_BITS else block_size
    half = cache == "fp8" and bits == PLAIN_BITS  # survivors take the cache's own precision
    for size in sizes:
        blocks = size * window_size / block_size * (2 if half else 1)
        kept = blocks * packed
        if blocks >= 1 and kept <= window_size * (1 if bits < PLAIN_BITS else 0.99):
            # At 1.0 nothing would be compressed, and so nothing quantised.
            yield min(kept / window_size, 0.9999)


def key_of(case: Case) -> str:
    return json.dumps([case.name, case.cache, resolved(case.config)], sort_keys=True)


@dataclass
class Point:
    """One setting and its results so far: row counts and sums per trace, and per recall text whether the fact was
    recalled."""

    case: Case
    traces: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    recalled: dict[str, bool] = field(default_factory=dict)

    def kl(self) -> Estimate:
        return self._mean(1)

    def agreed(self) -> Estimate:
        return self._mean(2)

    def _mean(self, which: int) -> Estimate:
        return bootstrap_ratio([t[which] for t in self.traces.values()], [t[0] for t in self.traces.values()])

    def against(self, other: Point) -> Estimate:
        """KL relative to the other's, by paired bootstrap over their common traces."""
        both = [name for name in self.traces if name in other.traces]
        return bootstrap_ratio([self.traces[n][1] for n in both], [other.traces[n][1] for n in both])

    def recall(self) -> Estimate | None:
        return wilson(sum(self.recalled.values()), len(self.recalled)) if self.recalled else None


class Log:
    """The log of a run. Raises UsageError if the file belongs to a run with other settings."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path = path
        self.points: dict[str, Point] = {}
        lines = read_log(path) if path and path.exists() else []
        for number, line in enumerate(lines, start=1):
            kind = line.pop("kind")
            if kind == RUN and line != about:
                shown = ", ".join(f"{k}={line.get(k)!r}, now {v!r}" for k, v in about.items() if line.get(k) != v)
                raise UsageError(f"--log {path}: belongs to another run ({shown}); use another file.")
            if kind in (TRACE, RECALL):
                try:
                    self._take(kind, line)
                except (KeyError, TypeError) as e:
                    raise not_a_log(path, number, e) from e
        if not lines:
            self._write({"kind": RUN, **about})

    def point(self, case: Case) -> Point:
        return self.points.setdefault(key_of(case), Point(case))

    def add(self, kind: str, case: Case, unit: str, result: Any) -> None:
        config = case.config.to_dict()
        line = {"name": case.name, "cache": case.cache, "config": config, "unit": unit, "result": result}
        self._take(kind, line)
        self._write({"kind": kind, **line})

    def _take(self, kind: str, line: dict[str, Any]) -> None:
        point = self.point(Case(line["name"], KvConfig.from_dict(line["config"]), line["cache"]))
        if kind == TRACE:
            point.traces[line["unit"]] = tuple(line["result"])
        else:
            point.recalled[line["unit"]] = line["result"]

    def _write(self, line: dict[str, Any]) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. An incomplete last line is removed from the file, unless it is no log."""
    content = path.read_bytes()
    whole = without_cut_line(content)
    read: list[dict[str, Any]] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as e:
            raise not_a_log(path, number, e) from e
        if not isinstance(row, dict) or "kind" not in row:
            raise not_a_log(path, number, "no kind")
        read.append(row)
    if whole != content:
        path.write_bytes(whole)
    return read


def not_a_log(path: Path | None, number: int, why: object) -> UsageError:
    return UsageError(f"--log {path}: not what `kvllm eval frontier` writes (line {number}: {why}); use another file.")


def measure_traces(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    cases: Sequence[Case],
    block_size: int,
    log: Log,
    goes_on: Callable[[], bool] = lambda: True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure what the log lacks, trace by trace with all cases, while `goes_on`."""
    for done, trace in enumerate(traces):
        progress(done, len(traces))
        todo = [case for case in cases if trace.id not in log.point(case).traces]
        if todo and goes_on():
            measured = fidelity.measure_trace(model, trace, todo, block_size, packed=True)
            for case, rows in zip(todo, measured, strict=True):
                if rows is not None:
                    log.add(TRACE, case, trace.id, [len(rows.kl), float(rows.kl.sum()), float(rows.agreed.sum())])
    progress(len(traces), len(traces))


def measure_recall(
    model: PreTrainedModel,
    tokenizer: Any,
    items: Sequence[recall.Item],
    cases: Sequence[Case],
    block_size: int,
    log: Log,
    goes_on: Callable[[], bool] = lambda: True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure the missing recall texts. Texts whose fact the full cache does not recall are not counted."""
    for done, item in enumerate(items):
        progress(done, len(items))
        unit = f"{item.distance}/{item.depth:g}/{item.sample}"
        todo = [case for case in cases if unit not in log.point(case).recalled]
        if todo and goes_on():
            full, *answers = recall.answer_item(model, tokenizer, item, todo, block_size, packed=True)
            for case, answer in zip(todo, answers, strict=True):
                if full.correct:
                    log.add(RECALL, case, unit, answer.correct)
    progress(len(items), len(items))


def measured(log: Log) -> list[Point]:
    """The points with results on traces."""
    return [point for point in log.points.values() if point.traces]


def held(points: Iterable[Point], config: Any, block_size: int, lengths: tuple[int, int]) -> list[tuple[Point, Held]]:
    """The points with their sizes in bytes, smallest first."""
    found = [(point, held_bytes(point.case, config, block_size, [lengths])) for point in points]
    return sorted(found, key=lambda each: (each[1].old, each[0].kl().value))


def random_like(point: Point, points: Iterable[Point]) -> Point | None:
    """The random baseline with the same bits, bytes and window sizes."""
    if not point.case.config.enabled:
        return None
    wanted = baseline_of(point.case.config)
    return next((p for p in points if p.case.config == wanted and p.case.cache == point.case.cache), None)


def kept_of(case: Case, block_size: int, head_dim: int) -> str:
    """Number of tokens that a window keeps."""
    geometry = geometry_of(case, block_size, head_dim)
    if geometry is None:
        return "all"
    return f"{float(geometry.kept_blocks) * (geometry.packed_tokens or block_size):g} of {case.config.window_size}"


def table(rows: Sequence[tuple[Point, Held]], config: Any, block_size: int) -> str:
    """Markdown, smallest first."""
    full, head_dim = full_bytes(config), head_dim_of(config.get_text_config())
    points, cells = [point for point, _ in rows], []
    for point, size in rows:
        case, random, recalled = point.case, random_like(point, points), point.recall()
        bits = str(case.config.survivor_bits) if case.config.enabled else ""
        cells.append(
            [
                f"{size.old / full:.3f}",
                f"{size.life / full:.3f}",
                f"{size.old / 1024:.2f}",
                case.cache,
                case.name,
                bits,
                kept_of(case, block_size, head_dim),
                interval(point.kl(), 4),
                interval(point.against(random), 2) if random and random is not point else "",
                f"{100 * point.agreed().value:.2f}",
                f"{100 * recalled.value:.0f} of {len(point.recalled)}" if recalled else "",
            ]
        )
    header = ["old", "life", "KiB, old", "cache", "method", "bits", "kept", "KL", "/ random's", "top-1 %", "recall %"]
    return markdown(header, cells)


def report(rows: Sequence[tuple[Point, Held]], **about: Any) -> dict[str, Any]:
    """The content of the JSON file."""
    points, results = [point for point, _ in rows], []
    for point, size in rows:
        random, recalled = random_like(point, points), point.recall()
        results.append(
            {
                "name": point.case.name,
                "cache": point.case.cache,
                "config": resolved(point.case.config),
                "bytes_per_old_token": size.old,
                "bytes_per_token_over_life": size.life,
                "kl": asdict(point.kl()),
                "kl_against_random": asdict(point.against(random)) if random else None,
                "top1_agreement": asdict(point.agreed()),
                "recall": asdict(recalled) if recalled else None,
                "traces": {name: {"num_rows": n, "kl": kl / n} for name, (n, kl, _) in point.traces.items()},
                "recalled": point.recalled,
            }
        )
    return {"task": "frontier", **environment(), **about, "results": results}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    lengths: prompt and answer length, in tokens, of the request whose cache size is reported
    minutes: time limit, after which a further call can continue; None: no limit
    """

    methods: Sequence[str]
    caches: Sequence[str]
    bits: Sequence[int]
    sizes: Sequence[float]
    common: dict[str, Any]
    half: str | None
    limit: int | None
    samples: int
    distances: Sequence[int]
    depths: Sequence[float]
    data: Path | None
    lengths: tuple[int, int]
    block_size: int
    minutes: float | None


def run(
    traces_path: Path, folder: str, plan: Plan, log_path: Path | None, device: str, dtype: str, outputs: Outputs
) -> None:
    """Measure what the log lacks, print the table and write the files in `outputs`."""
    traces = half_of(read_traces(traces_path), plan.half)[: plan.limit]
    model = load_model(folder, getattr(torch, dtype), device)
    plan = replace(plan, block_size=block_size_of(model, plan.block_size))
    head_dim = head_dim_of(model.config.get_text_config())
    cases = grid(plan.methods, plan.caches, plan.bits, plan.sizes, plan.block_size, head_dim, plan.common)
    about = {
        "model": Path(folder).name,
        "traces": traces_path.name,
        "half": plan.half,
        "block_size": plan.block_size,
        "dtype": dtype,
    }
    log, start = Log(log_path, about), time.perf_counter()

    def goes_on() -> bool:
        return plan.minutes is None or time.perf_counter() - start < 60 * plan.minutes

    measure_traces(model, traces, cases, plan.block_size, log, goes_on, Progress("traces"))
    if plan.samples:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        items = recall.make_items(tokenizer, plan.distances, plan.depths, plan.samples, data=plan.data)
        items.sort(key=lambda item: item.sample)  # so that a run that stops early covers every distance and depth
        measure_recall(model, tokenizer, items, cases, plan.block_size, log, goes_on, Progress("texts"))
    if not measured(log):
        raise UsageError(f"{traces_path}: no trace is long enough to be compressed; use longer traces.")
    rows = held(measured(log), model.config, plan.block_size, plan.lengths)
    full = full_bytes(model.config)
    seconds = time.perf_counter() - start
    facts = {**about, "full_bytes_per_token": full, "lengths": plan.lengths, "seconds": seconds}
    title = f"{Path(folder).name}, answers of {plan.lengths[1]:,} tokens after prompts of {plan.lengths[0]:,}"
    outputs.write(
        table(rows, model.config, plan.block_size), report(rows, **facts), lambda path: plot_frontier(rows, title, path)
    )
    short = sum(len(point.traces) < len(traces) for point, _ in rows)
    unfinished = f" ({short} not on all traces)" if short else ""
    print(f"\n{len(traces)} traces, {len(rows)} settings{unfinished}, {dtype} on {device}, {seconds:.0f} s")
    print(f"A token takes {full:,.0f} bytes in 16 bits. Old and life: shares of it, of an old token, and of all tokens")
    print(f"over the life of an answer of {plan.lengths[1]:,} tokens after a prompt of {plan.lengths[0]:,}.")
