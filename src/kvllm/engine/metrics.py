"""Compression metrics on vLLM's /metrics, in its style: prefix `kvllm:`, labels model_name and engine.

A scheduler sends the counts since its last report with vLLM's statistics of a step, at most ten times a second. They go
to one of the API servers, which adds them to its counters, and Prometheus's multiprocess mode adds up those of all API
servers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.utils import create_metric_per_engine

from kvllm.engine.stats import EngineStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

PREFIX = "kvllm:"
REPORT_KEY = "kvllm"  # in the field of SchedulerStats that carries our report
# Seconds between two reports. Adding up 256 requests takes 20 to 45 us, too much for each step of a small model, and
# Prometheus scrapes once in many seconds.
REPORT_INTERVAL = 0.1

# Counted since the engine started. prometheus_client appends _total to each name.
COUNTERS = {
    "windows_compressed": "Compressions of a request: each reads one window of its generated tokens.",
    "kv_tokens_kept": "Tokens whose KV pairs a compression read and kept.",
    "kv_tokens_evicted": "Tokens whose KV pairs a compression evicted.",
    "kv_blocks_returned": "KV blocks that compressions returned to the pool.",
    "prompts_cut": "Prompts that were cut to the prompt budget.",
    "requests_held_back": "Waiting requests that were not admitted although blocks were free, because running requests "
    "will need these blocks. Most would have caused a preemption.",
    "compression_seconds": "Seconds that compressions took on the device; with several devices, on one of them.",
}
# Current values.
GAUGES = {
    "kv_tokens_logical": "Tokens of the running requests that have been computed, prompts included.",
    "kv_tokens_physical": "Of these, the tokens that are in the KV cache.",
    "effective_retention": "kv_tokens_physical / kv_tokens_logical; 1 while nothing runs.",
    "query_bank_rows_used": "Rows of the query bank that running requests hold.",
    "query_bank_rows": "Rows of the query bank (max_num_seqs).",
}

_registered: list[Counter | Gauge] = []


class Report:
    """Makes a scheduler's reports: current gauges, and the increments of counters since the last report."""

    def __init__(self) -> None:
        self._sent: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._next_time = 0.0

    def is_due(self, any_running: bool) -> bool:
        """Whether to report with this step: once in an interval, and whenever nothing runs, as after the last."""
        now = time.monotonic()
        if any_running and now < self._next_time:
            return False
        self._next_time = now + REPORT_INTERVAL
        return True

    def next(self, now: Mapping[str, float]) -> dict[str, float]:
        """now: the totals of all counters, and all gauges"""
        added = {name: now[name] - sent for name, sent in self._sent.items() if now[name] != sent}
        self._sent.update((name, now[name]) for name in added)
        return added | {name: now[name] for name in GAUGES}


def metric_values(stats: EngineStats, num_rows: int) -> dict[str, float]:
    """All counters and gauges by name.

    num_rows: rows of the query bank; each running request holds one
    """
    logical, physical = stats["num_logical_tokens"], stats["num_physical_tokens"]
    return {
        "windows_compressed": stats["num_windows_compressed"],
        "kv_tokens_kept": stats["num_tokens_kept"],
        "kv_tokens_evicted": stats["num_tokens_evicted"],
        "kv_blocks_returned": stats["num_blocks_freed"],
        "prompts_cut": stats["num_prompts_cut"],
        "requests_held_back": stats["num_held_back"],
        "compression_seconds": stats["compression_seconds"],
        "kv_tokens_logical": logical,
        "kv_tokens_physical": physical,
        "effective_retention": physical / logical if logical else 1.0,
        "query_bank_rows_used": stats["num_running"],
        "query_bank_rows": num_rows,
    }


def add_report(stats: SchedulerStats, report: Mapping[str, float]) -> None:
    """Add our report to a field that reaches the front end unchanged."""
    stats.ec_connector_stats = {**(stats.ec_connector_stats or {}), REPORT_KEY: dict(report)}


def take_report(stats: SchedulerStats) -> Mapping[str, float] | None:
    """Remove our report from the field again, before vLLM's loggers read it: it belongs to encoder cache connectors."""
    if not stats.ec_connector_stats or REPORT_KEY not in stats.ec_connector_stats:
        return None
    others = dict(stats.ec_connector_stats)
    report = others.pop(REPORT_KEY)
    stats.ec_connector_stats = others or None
    return report


class KvStatLogger(AggregateStatLoggerBase):
    """Records the reports of all engines of a front end. Must come before vLLM's own loggers."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        while _registered:  # by an earlier engine of this process
            REGISTRY.unregister(_registered.pop())
        labels = ["model_name", "engine"]
        model_name = vllm_config.model_config.served_model_name
        values: dict[int, list[object]] = {index: [model_name, str(index)] for index in engine_indexes}
        self.counters: dict[str, Any] = {}
        self.gauges: dict[str, Any] = {}
        for name, text in COUNTERS.items():
            _registered.append(Counter(PREFIX + name, text, labels))
            self.counters[name] = create_metric_per_engine(_registered[-1], values)
        for name, text in GAUGES.items():
            _registered.append(Gauge(PREFIX + name, text, labels, multiprocess_mode="mostrecent"))
            self.gauges[name] = create_metric_per_engine(_registered[-1], values)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        report = take_report(scheduler_stats) if scheduler_stats is not None else None
        for name, value in (report or {}).items():
            if name in self.counters:
                self.counters[name][engine_idx].inc(value)
            else:
                self.gauges[name][engine_idx].set(value)

    def log_engine_initialized(self) -> None:
        """Does nothing: the scheduler logs our start-up summary."""
