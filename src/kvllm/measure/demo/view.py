"""The demo's table: live figures while the engines run, results when they are done."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from kvllm.measure.demo.job import Agreement, Job, Outcome, Status

STOCK, OURS = "stock vLLM", "KvLLM"


def live_table(job: Job, states: Mapping[str, Status | str | Outcome]) -> Table:
    """One column per engine: its status while it waits, live figures while it runs, results when it is done."""
    table = Table("", *states, expand=False, min_width=78)
    for heading, cells in (
        ("state", [_state(s) for s in states.values()]),
        ("requests finished", [_bar(_finished(s), job.num_requests) for s in states.values()]),
        ("running at once", [_bar(_running(s), job.num_requests) for s in states.values()]),
        ("KV cache blocks in use", [_bar(_blocks(s), job.num_blocks) for s in states.values()]),
        ("preempted, then recomputed", [_count(_preempted(s)) for s in states.values()]),
        ("finished per minute", [_per_minute(s) for s in states.values()]),
    ):
        table.add_row(heading, *cells)
    return table


def summary(job: Job, stock: Outcome, ours: Outcome) -> Table:
    """The last screen's table."""
    table = Table(f"{job.num_requests} requests, a pool for {job.num_fitting}", STOCK, OURS, "", min_width=78)
    for column in table.columns[1:]:
        column.justify = "right"
    speed = Text(f"{ours.per_minute / stock.per_minute:.2f}x", "bold green" if ours.seconds < stock.seconds else "bold")
    table.add_row("requests finished per minute", f"{stock.per_minute:.1f}", f"{ours.per_minute:.1f}", speed)
    table.add_row("seconds until all have finished", f"{stock.seconds:.0f}", f"{ours.seconds:.0f}", "")
    more = f"{ours.mean_running / stock.mean_running:.2f}x"
    table.add_row("requests running at once, mean", f"{stock.mean_running:.1f}", f"{ours.mean_running:.1f}", more)
    table.add_row("preempted, then recomputed", str(stock.preempted), str(ours.preempted), "")
    peaks = (f"{each.peak_blocks} of {job.num_blocks}" for each in (stock, ours))
    table.add_row("KV cache blocks in use, most", *peaks, "")
    return table


def sentence(agreement: Agreement) -> str:
    """How close the answers are to the full cache's, in words for newcomers."""
    if not agreement.num_tokens:
        return "The answers were too short for anything to be compressed, so they are those of the full cache."
    return (
        f"Reading the same text, KvLLM would write the same next token as the full cache {agreement.ours:.1%} of the "
        f"time; with as much of the cache thrown away at random it would be {agreement.random:.1%}."
    )


def _bar(value: float | None, total: int) -> Text:
    if value is None:
        return Text("")
    filled = round(12 * min(value / total, 1))
    return Text.assemble(("█" * filled, "green"), ("░" * (12 - filled), "dim"), f" {value:.0f} of {total}")


def _state(state: Status | str | Outcome) -> str:
    if isinstance(state, str):
        return state
    return f"running, {state.seconds:.0f} s" if isinstance(state, Status) else f"done in {state.seconds:.0f} s"


def _finished(state: Status | str | Outcome) -> float | None:
    if isinstance(state, str):
        return None
    return state.finished if isinstance(state, Status) else state.num_requests


def _running(state: Status | str | Outcome) -> float | None:
    if isinstance(state, str):
        return None
    return state.running if isinstance(state, Status) else state.mean_running


def _blocks(state: Status | str | Outcome) -> float | None:
    if isinstance(state, str):
        return None
    return state.blocks if isinstance(state, Status) else state.peak_blocks


def _preempted(state: Status | str | Outcome) -> int | None:
    return None if isinstance(state, str) else state.preempted


def _count(number: int | None) -> str:
    return "" if number is None else str(number)


def _per_minute(state: Status | str | Outcome) -> str:
    if isinstance(state, Status):
        return f"{60 * state.finished / state.seconds:.1f}" if state.finished else "0"
    return f"{state.per_minute:.1f}" if isinstance(state, Outcome) else ""
