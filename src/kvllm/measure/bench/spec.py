"""What `kvllm bench throughput` measures: the options, and the configurations written like `kara:0.3`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvllm.config import CONFIG_KEY
from kvllm.errors import UsageError
from kvllm.measure.bench.shapes import SHAPES
from kvllm.methods import checked_config

STOCK, OFF = "stock", "off"
CONFIG_SYNTAX = "stock, off (plugin loaded, nothing configured) or METHOD:RATIO[:OPTION=VALUE,...]"


@dataclass(frozen=True)
class Configuration:
    """One way to serve. `options` are KvConfig's; None leaves KvLLM unconfigured."""

    label: str
    options: dict[str, Any] | None = None

    @classmethod
    def parse(cls, text: str) -> Configuration:
        """From text such as `stock`, `kara:0.3` or `snapkv:0.5:policy=budget,budget_size=1024`.

        A value is JSON where it can be, and `method_options.NAME` sets an option of the method.
        """
        if text in (STOCK, OFF):
            return cls(text)
        method, _, rest = text.partition(":")
        ratio, _, extra = rest.partition(":")
        try:
            options: dict[str, Any] = {"method": method, "retention_ratio": float(ratio)}
        except ValueError as e:
            raise UsageError(f"config={text!r}: expected {CONFIG_SYNTAX}.") from e
        for item in filter(None, extra.split(",")):
            key, equals, value = item.partition("=")
            if not equals:
                raise UsageError(f"config={text!r}: {item!r} is not OPTION=VALUE.")
            name, _, inner = key.partition(".")
            if inner:
                options.setdefault(name, {})[inner] = _value(value)
            else:
                options[name] = _value(value)
        checked_config(options)  # refuses what is wrong before any engine starts
        return cls(text, options)

    @property
    def plugins(self) -> str:
        """VLLM_PLUGINS of the engine's process: the plugins that it may load."""
        return "" if self.label == STOCK else CONFIG_KEY

    def engine_key(self) -> tuple[str, str]:
        """Equal for configurations that one engine can serve: a request carries its own ratio."""
        if self.options is None:
            return (self.label, "")
        return ("", json.dumps({k: v for k, v in self.options.items() if k != "retention_ratio"}, sort_keys=True))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def option(default: Any, help: str) -> Any:
    """A dataclass field that the command line shows with this help."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """The one home of the benchmark's defaults: the command line takes its options from here."""

    model: str = option("qwen3-8b", f"A model folder, or a shape with random weights: {', '.join(SHAPES)}.")
    config: list[str] = option([STOCK, "kara:0.3"], f"What to compare (repeatable): {CONFIG_SYNTAX}.")
    concurrency: list[int] = option([64], "Maximum number of requests in flight (repeatable).")
    num_requests: int | None = option(None, "Number of requests of a run; default: four times the concurrency.")
    prompt_len: int = option(256, "Tokens of each prompt, random and all different.")
    output_len: int = option(8192, "Tokens that each request generates.")
    stagger: bool = option(False, "Spread the first requests' lengths, so that lengths are mixed once they end.")
    seconds: float | None = option(None, "Stop after this much of the steady state; left out: at the last request.")
    max_seconds: float = option(480.0, "Stop a run after this long, whatever its state.")
    profile_steps: int | None = option(
        None, "Profile this many steps of each steady state: what KvLLM's kernels take. The profiler slows the run."
    )
    warmup_seconds: float = option(5.0, "Serve this long before an engine's first run of each configuration.")
    max_num_seqs: int | None = option(None, "As in vLLM; left out: the largest concurrency.")
    max_model_len: int | None = option(None, "As in vLLM; left out: what a request needs.")
    max_num_batched_tokens: int | None = option(None, "As in vLLM.")
    gpu_memory_utilization: float | None = option(None, "As in vLLM.")
    num_gpu_blocks: int | None = option(None, "Size of the KV pool in blocks, one of them the null block.")
    block_size: int | None = option(None, "As in vLLM; left out: KvLLM's default, for stock too.")
    dtype: str = option("auto", "As in vLLM.")
    enforce_eager: bool = option(False, "As in vLLM: no CUDA graphs, no torch.compile.")
    capture_sizes: list[int] = option([], "Batch size to capture CUDA graphs for (repeatable).")
    engine_args: dict[str, Any] = option({}, "More of vLLM's EngineArgs, as JSON.")
    temperature: float = option(0.0, "Of sampling.")
    seed: int = option(0, "Of the prompts.")

    def __post_init__(self) -> None:
        for name in ("prompt_len", "output_len", "max_seconds"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}={getattr(self, name)}: must be positive.")
        if not self.config or not self.concurrency or min(self.concurrency) < 1:
            raise UsageError("give at least one --config and one --concurrency of 1 or more.")
        if self.model not in SHAPES and not (Path(self.model) / "config.json").is_file():
            raise UsageError(f"model={self.model!r}: no folder with a config.json, and none of {', '.join(SHAPES)}.")
        self.configurations()

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> BenchSpec:
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in options if key not in known]:
            raise UsageError(f"kvllm bench throughput has no option {unknown[0]!r}; options are {', '.join(known)}.")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def configurations(self) -> list[Configuration]:
        return [Configuration.parse(text) for text in self.config]

    def requests_of(self, concurrency: int) -> int:
        return self.num_requests or 4 * concurrency

    def vllm_args(self, model_dir: str) -> dict[str, Any]:
        """EngineArgs that all configurations share."""
        # The last token is sampled and never fed back; one spare keeps vLLM from cutting the output short.
        args: dict[str, Any] = {
            "model": model_dir,
            "max_model_len": self.max_model_len or self.prompt_len + self.output_len + 1,
            "max_num_seqs": self.max_num_seqs or max(self.concurrency),
            "dtype": self.dtype,
            "enforce_eager": self.enforce_eager,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "seed": 0,
        }
        if self.model in SHAPES:
            args["load_format"] = "dummy"
        given = {
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "num_gpu_blocks_override": self.num_gpu_blocks,
            "block_size": self.block_size,
            "cudagraph_capture_sizes": self.capture_sizes or None,
        }
        return args | {k: v for k, v in given.items() if v is not None} | self.engine_args


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    label: str
    concurrency: int
    options: dict[str, Any] | None


@dataclass(frozen=True)
class EngineJob:
    """One engine process, and the runs that it serves in turn."""

    plugins: str
    options: dict[str, Any] | None  # of the engine; a run's own ratio travels with its requests
    runs: list[Run]


def engine_jobs(spec: BenchSpec) -> list[EngineJob]:
    """The engines to start, in the order in which their configurations were named."""
    groups: list[tuple[tuple[str, str], list[Configuration]]] = []
    for configuration in spec.configurations():
        shared = [group for key, group in groups if configuration.options and key == configuration.engine_key()]
        if shared:
            shared[0].append(configuration)
        else:
            groups.append((configuration.engine_key(), [configuration]))
    jobs = []
    for _, group in groups:
        runs = [Run(c.label, n, c.options) for c in group for n in spec.concurrency]
        jobs.append(EngineJob(group[0].plugins, _engine_options(group), runs))
    return jobs


def _engine_options(group: list[Configuration]) -> dict[str, Any] | None:
    """The largest ratio plans the pool most carefully; 1.0 only where no run compresses. Requests may choose any."""
    if group[0].options is None:
        return None
    ratios = [c.options["retention_ratio"] for c in group if c.options]
    own = max([r for r in ratios if r < 1.0] or ratios)
    options = {**group[0].options, "retention_ratio": own}
    others = [repr(r) for r in dict.fromkeys(ratios) if r != own]
    if others:
        options["request_ratios"] = ",".join(filter(None, [options.get("request_ratios"), *others]))
    return options
