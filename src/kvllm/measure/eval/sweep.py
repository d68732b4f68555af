"""Sweeps of configurations: JSON in which a list stands for several values.

[{"method": "kara", "retention_ratio": [0.2, 0.3], "method_options": {"moment": ["mean", "rms"]}}, ...]
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.methods import checked_config
from kvllm.options import parse_json, parse_numbers

# Always measured: a method must at least beat these.
BASELINES = ("random", "recent")
FULL = "full cache"  # key for a label in tables
SWEEPS = Path(__file__).parent / "sweeps"  # built-in sweeps by name


@dataclass(frozen=True)
class Case:
    """A configuration and its label in tables: the method and the options that the sweep varies.

    cache: vLLM's --kv-cache-dtype, one of `cache_formats.CACHE_DTYPES`
    """

    name: str
    config: KvConfig
    cache: str = "auto"

    @property
    def label(self) -> str:
        return f"{self.name} r={self.config.mean_ratio:g}" + (f" {self.cache}" if self.cache != "auto" else "")


def cases(
    entries: Iterable[Mapping[str, Any]],
    common: Mapping[str, Any] | None = None,
    baselines: Sequence[str] = BASELINES,
) -> list[Case]:
    """All combinations of every entry, which overrides `common`; baselines are added for each ratio and size.

    An entry's key "name" replaces the label made from its options. Equal configurations are measured once.
    """
    common = common or {}
    found: dict[str, Case] = {}

    def add(case: Case) -> None:
        found.setdefault(json.dumps(case.config.to_dict(), sort_keys=True), case)

    for entry in entries:
        for options in combinations({**common, **entry}):
            given = options.pop("name", None)
            config = checked_config(options)
            if config.method in BASELINES:
                add(Case(given or config.method, baseline_of(config, config.method)))
            else:
                add(Case(given or name_of(options, common), config))
    for case in list(found.values()):
        own = ("query_stride", "max_chunk_size", "retention_ratio")
        sizes = {k: v for k, v in case.config.to_dict().items() if k not in own}
        for method in baselines:
            if case.config.enabled:
                name = name_of({**sizes, "method": method, "method_options": {}}, common)
                add(Case(name, baseline_of(case.config, method)))
    return list(found.values())


def baseline_of(config: KvConfig, method: str = "random") -> KvConfig:
    """A baseline with the same policy, mean ratio and sizes. It uses no queries, so it stores few."""
    sizes = [config.window_size, config.buffer_size]
    if config.policy == "budget":
        sizes += [config.budget_size, config.budget_interval]
    plain: dict[str, Any] = {"method": method, "method_options": {}, "retention_ratio": config.mean_ratio}
    return replace(config, **plain, query_stride=math.gcd(*sizes), max_chunk_size=1)


def combinations(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One dict for each combination of values from the entry's lists, including lists inside mappings."""
    choices = []
    for key, value in entry.items():
        if isinstance(value, Mapping):
            choices.append([(key, chosen) for chosen in combinations(value)])
        else:
            choices.append([(key, chosen) for chosen in (value if isinstance(value, list) else [value])])
    for chosen in itertools.product(*choices):
        yield dict(chosen)


def name_of(options: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """The method and the options that differ from the defaults and from `common`, without the ratio."""
    defaults = KvConfig()
    parts = [str(options.get("method", defaults.method))]
    for key, value in options.items():
        if key in ("method", "method_options", "retention_ratio") or value == getattr(defaults, key, None):
            continue
        if key not in common or common[key] != value:
            parts.append(f"{key}={value}")
    if isinstance(table := options.get("retention_ratio"), Mapping):
        parts += [f"{layers}:{ratio:g}" for layers, ratio in table.items()]
    parts += [f"{key}={value}" for key, value in options.get("method_options", {}).items()]
    return " ".join(parts)


def parse_cases(
    configs: Sequence[str],
    methods: str | None,
    ratios: str | None,
    common: Mapping[str, Any] | None = None,
    baselines: Sequence[str] = BASELINES,
) -> list[Case]:
    """Cases from the command line: entries as JSON, JSON files or built-in sweeps, and a grid of methods and ratios."""
    entries: list[Mapping[str, Any]] = []
    shared = dict(common or {})
    if ratios:
        shared["retention_ratio"] = parse_numbers("--ratios", ratios, float, "0.3,0.5")
    for text in configs:
        if not text.lstrip().startswith(("[", "{")):
            shipped = SWEEPS / f"{text}.json"
            text = (shipped if shipped.exists() else Path(text)).read_text()
        parsed = parse_json("--configs", text)
        entries += parsed if isinstance(parsed, list) else [parsed]
    if methods:
        entries.append({"method": methods.split(",")})
    if not entries:
        raise UsageError("nothing to measure: give --methods or --configs.")
    return cases(entries, shared, baselines)
