"""Options of `kvllm bench throughput`, and the syntax of configurations such as `kara:0.3`."""

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
    """A configuration to measure. options: fields of KvConfig; None: KvLLM is not configured."""

    label: str
    options: dict[str, Any] | None = None

    @classmethod
    def parse(cls, text: str) -> Configuration:
        """Parse text such as `stock`, `kara:0.3` or `snapkv:0.5:policy=budget,budget_size=1024`.

        Values are parsed as JSON if possible, else taken as strings; `method_options.NAME` sets a method option.
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
        checked_config(options)  # raises UsageError before any engine starts
        return cls(text, options)

    @property
    def plugins(self) -> str:
        """Value of VLLM_PLUGINS in the engine's process."""
        return "" if self.label == STOCK else CONFIG_KEY

    def engine_key(self) -> tuple[str, str]:
        """Equal for configurations that can share an engine: those that differ in the ratio, which is per request."""
        if self.options is None:
            return (self.label, "")
        return ("", json.dumps({k: v for k, v in self.options.items() if k != "retention_ratio"}, sort_keys=True))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text of its command-line option."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """All options of the benchmark with their defaults; the command line is generated from these fields."""

    model: str = option("qwen3-8b", f"A model's folder, or a shape with random weights: {', '.join(SHAPES)}.")
    config: list[str] = option([STOCK, "kara:0.3"], f"Configuration to measure (repeatable): {CONFIG_SYNTAX}.")
    concurrency: list[int] = option([64], "Maximum number of requests in flight (repeatable).")
    num_requests: int | None = option(None, "Number of requests per run. Default: four times the concurrency.")
    prompt_len: int = option(256, "Prompt length in tokens; prompts are random and all different.")
    output_len: int = option(8192, "Number of tokens that each request generates.")
    stagger: bool = option(False, "Vary the lengths of the first requests, so that requests do not finish in step.")
    seconds: float | None = option(None, "Length of the steady state to measure. Default: until the last request.")
    max_seconds: float = option(480.0, "Stop a run after this time in any case.")
    profile_steps: int | None = option(
        None, "Profile KvLLM's kernels for this many steps of each steady state, which slows down the run."
    )
    warmup_seconds: float = option(5.0, "Warm-up time before an engine's first run of each configuration.")
    max_num_seqs: int | None = option(None, "As in vLLM. Default: the largest concurrency.")
    max_model_len: int | None = option(None, "As in vLLM. Default: prompt and output length.")
    max_num_batched_tokens: int | None = option(None, "As in vLLM.")
    gpu_memory_utilization: float | None = option(None, "As in vLLM.")
    num_gpu_blocks: int | None = option(None, "Size of the KV pool in blocks, including the null block.")
    block_size: int | None = option(None, "As in vLLM. Default: KvLLM's, also for stock vLLM.")
    dtype: str = option("auto", "As in vLLM.")
    enforce_eager: bool = option(False, "As in vLLM: no CUDA graphs, no torch.compile.")
    capture_sizes: list[int] = option([], "Batch size to capture a CUDA graph for (repeatable).")
    engine_args: dict[str, Any] = option({}, "Further fields of vLLM's EngineArgs, as JSON.")
    random_experts: bool = option(
        False,
        "For a mixture of experts with random weights, which send all tokens to the same few experts: each token goes "
        "to experts drawn at random (vLLM's routing simulation), so that all weights are read, as of a trained model.",
    )
    temperature: float = option(0.0, "Sampling temperature; 0 = greedy.")
    seed: int = option(0, "Random seed of the prompts.")

    def __post_init__(self) -> None:
        for name in ("prompt_len", "output_len", "max_seconds"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}={getattr(self, name)}: must be positive.")
        if not self.config or not self.concurrency or min(self.concurrency) < 1:
            raise UsageError("give at least one --config and one --concurrency, 1 or more.")
        if self.model not in SHAPES and not (Path(self.model) / "config.json").is_file():
            raise UsageError(f"model={self.model!r}: no folder with a config.json, nor one of {', '.join(SHAPES)}.")
        if self.random_experts and not {"num_local_experts", "num_experts"} & SHAPES.get(self.model, {}).keys():
            raise UsageError(
                f"random_experts: only for a shape that is a mixture of experts, which {self.model!r} is not; leave it "
                "out. The router of a trained model spreads the tokens itself."
            )
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

    def environment(self) -> dict[str, str]:
        """Environment variables that all engines share."""
        return {"VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random"} if self.random_experts else {}

    def vllm_args(self, model_dir: str) -> dict[str, Any]:
        """EngineArgs that all configurations share."""
        # + 1: otherwise vLLM would cut the output short by the last token.
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
    """One run, a row of the result table."""

    label: str
    concurrency: int
    options: dict[str, Any] | None


@dataclass(frozen=True)
class EngineJob:
    """One engine process and the runs that it serves, in order."""

    plugins: str
    options: dict[str, Any] | None  # of the engine; a run's ratio is sent with its requests
    runs: list[Run]


def engine_jobs(spec: BenchSpec) -> list[EngineJob]:
    """The engines to start, in the order of their configurations."""
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
    """Options of an engine that serves all configurations of a group.

    Its default is the largest ratio, the most conservative for admission, and 1.0 only if no run compresses. Requests
    may choose any of the group's ratios.
    """
    if group[0].options is None:
        return None
    ratios = [c.options["retention_ratio"] for c in group if c.options]
    own = max([r for r in ratios if r < 1.0] or ratios)
    options = {**group[0].options, "retention_ratio": own}
    others = [repr(r) for r in dict.fromkeys(ratios) if r != own]
    if others:
        options["request_ratios"] = ",".join(filter(None, [options.get("request_ratios"), *others]))
    return options
