"""What a user can set: one validated dataclass, shared by the engine, the reference, the CLI and the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import ceil, floor
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from kvllm.budgets import Budget, mean_ratio, parse_table
from kvllm.errors import UsageError
from kvllm.options import STRICT, Count, NotAFloat, check_value, parse_json, strict_dataclass

RetentionRatio = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Share of a window that is kept: to evict 30% use 0.7, to turn compression off use 1.0.",
    ),
]
# Keys of our options in vLLM's `additional_config`, and of a request's own options in its `extra_args`.
CONFIG_KEY = "kvllm"
RATIO_KEY = "kv_retention_ratio"
METHOD_KEY = "kv_method"
USAGE_KEY = "kv_usage"  # whether the response's usage reports what was kept and evicted
REQUEST_KEYS = (RATIO_KEY, METHOD_KEY, USAGE_KEY)

# Presets for windows of 256 tokens, named after how many times smaller a compressed window is. docs/choosing.md gives
# the cost of each.
PRESET_KEY = "compression"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "4x": {"survivor_bits": 4, "retention_ratio": 0.875},
    "8x": {"survivor_bits": 4, "retention_ratio": 0.4375},
    "16x": {"survivor_bits": 4, "retention_ratio": 0.21875},
}

RETENTION_RATIO = TypeAdapter(RetentionRatio, config=STRICT)
METHOD_NAME = TypeAdapter(str, config=STRICT)


@strict_dataclass(kw_only=True)
class KvConfig:
    """The one home of these defaults: every front end takes its options from here.

    Sizes are in tokens. A `retention_ratio` of 1.0 turns compression off; a table of ratios (`kvllm.budgets`) stands
    for several configurations, one for each group of layers (`parts`). vLLM's block size is known only once an engine
    exists, so `kvllm.layout.Geometry` checks what depends on it. Creating the method checks its name and options: front
    ends use `kvllm.methods.checked_config`, which does both.
    """

    method: str = Field("kara", description="Method that scores and selects; `kvllm methods` lists them.")
    method_options: Mapping[str, Any] = Field(
        default_factory=dict, description="The method's own options, as JSON; `kvllm methods METHOD` shows them."
    )
    policy: Literal["window", "budget"] = Field(
        "window",
        description="window: each window is compressed once; budget: the generated tokens are cut to `budget_size` "
        "at regular intervals.",
    )
    retention_ratio: RetentionRatio | Mapping[str, Any] = Field(
        0.3,
        description="Share of a window that is kept: to evict 30% use 0.7, to turn compression off use 1.0. A table "
        'gives groups of layers ratios of their own: {"0-13": 0.4, "14-27": 0.2}.',
    )
    window_size: Count = Field(256, description="Tokens compressed at once; a multiple of vLLM's block size.")
    buffer_size: Count = Field(128, description="Newest tokens, never compressed.")
    max_chunk_size: Count = Field(8, description="Maximum chunk length of Token2Chunk; 1 = no chunks.")
    query_stride: Count = Field(4, description="Each head keeps the query of every n-th token for scoring.")
    history_size: int = Field(
        0,
        ge=0,
        description="policy=window: maximum number of survivors of a request, at which they are compressed again; "
        "0 = no limit.",
    )
    survivor_bits: Annotated[Literal[16, 8, 4], NotAFloat] = Field(
        16,
        description="policy=window: bits per element of the survivors' keys and values; 16 = the cache's own dtype, "
        "even if it has fewer bits. The prompt and tokens that are not compressed yet are never rounded.",
    )
    request_ratios: str = Field(
        "",
        description=f"Ratios that requests may choose with {RATIO_KEY} besides the engine's own: single ratios "
        "and ranges, such as 0.2-0.5,1.0. Empty: none.",
    )
    request_methods: str | Mapping[str, Any] = Field(
        "",
        description=f"Methods that requests may choose with {METHOD_KEY} besides the engine's own: names, such as "
        'random,keydiff, or names with options: {"random": {}, "snapkv": {"kernel_size": 5}}. Empty: none.',
    )
    budget_size: Count = Field(
        2048, description="policy=budget: generated tokens kept; a multiple of vLLM's block size."
    )
    budget_interval: Count = Field(
        128, description="policy=budget: tokens between two cuts; a multiple of vLLM's block size."
    )
    prompt_budget: int = Field(
        0,
        ge=0,
        description="A longer prompt is cut to this many tokens at the request's first compression; a multiple of "
        "vLLM's block size. 0 = prompts stay whole.",
    )
    seed: int = Field(0, description="Seed of methods that use random numbers.")

    def __post_init__(self) -> None:
        parse_ratios(self.request_ratios)
        if self.method in parse_methods(self.request_methods):
            raise UsageError(
                f"request_methods={self.request_methods!r}: {self.method} is the engine's own method, which requests "
                "may always choose. Leave it out; its options are method_options."
            )
        self._check_table()
        if self.history_size and self.policy != "window":
            raise UsageError(
                f"history_size={self.history_size}: only for policy=window; with policy={self.policy} the memory is "
                "bounded by budget_size. Leave history_size at 0, or use policy=window."
            )
        self._check_survivor_bits()
        for name in self._aligned_to_stride():
            if getattr(self, name) % self.query_stride:
                raise UsageError(
                    f"query_stride={self.query_stride}: must divide {name}={getattr(self, name)}, "
                    f"so that every window is scored by the same number of queries; try a power of two."
                )

    def _check_table(self) -> None:
        """Refuse a table of ratios that would have no effect, or that a request's own ratio would override."""
        if not self.budgets:
            return
        table = f"retention_ratio={dict(self.retention_ratio)}"  # type: ignore[arg-type]
        if self.policy != "window":
            raise UsageError(
                f"{table}: only for policy=window; with policy={self.policy} every layer keeps budget_size="
                f"{self.budget_size} tokens. Use one ratio, or policy=window."
            )
        if others := [low for low, high in parse_ratios(self.request_ratios) if (low, high) != (1.0, 1.0)]:
            raise UsageError(
                f"request_ratios={self.request_ratios!r}: a request's ratio applies to all layers, so {others[0]} "
                f"contradicts {table}. Use request_ratios=1.0 (requests may turn compression off), or leave it out."
            )

    def _check_survivor_bits(self) -> None:
        """Refuse to round the same tokens repeatedly, and a setting that would round nothing."""
        if self.survivor_bits == 16:
            return
        again = "keys and values would be rounded again at each compression"
        for name, value, remedy in (
            ("policy", self.policy if self.policy != "window" else "", "policy=window"),
            ("history_size", self.history_size, "history_size=0"),
        ):
            if value:
                raise UsageError(
                    f"survivor_bits={self.survivor_bits}: cannot be combined with {name}={value}, because {again}. Use "
                    f"{remedy}, or survivor_bits=16."
                )
        if self.prompt_budget:
            raise UsageError(
                f"survivor_bits={self.survivor_bits}: cannot be combined with prompt_budget={self.prompt_budget}, "
                "because the kept tokens of a prompt are not rounded. Use prompt_budget=0, or survivor_bits=16."
            )
        if all(low >= 1.0 for low, _ in self.request_ratio_ranges):
            raise UsageError(
                f"survivor_bits={self.survivor_bits}: has no effect, because nothing is compressed with "
                f"retention_ratio={self.retention_ratio}. Use a lower retention_ratio, or survivor_bits=16."
            )

    def _aligned_to_stride(self) -> tuple[str, ...]:
        if self.policy == "window":
            return ("window_size", "buffer_size")
        return ("window_size", "buffer_size", "budget_size", "budget_interval")

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The groups of layers that have ratios of their own; empty if all layers share one ratio."""
        return () if isinstance(self.retention_ratio, int | float) else parse_table(self.retention_ratio)

    @property
    def mean_ratio(self) -> float:
        """Share of a window that survives, averaged over the layers."""
        return mean_ratio(self.budgets) if self.budgets else self.retention_ratio  # type: ignore[return-value]

    @property
    def parts(self) -> tuple[KvConfig, ...]:
        """The configuration of each group of layers: the same but for its own ratio."""
        if not self.budgets:
            return (self,)
        return tuple(replace(self, retention_ratio=budget.ratio) for budget in self.budgets)

    @property
    def enabled(self) -> bool:
        """Whether requests are compressed unless they choose a ratio of 1.0."""
        return self.mean_ratio < 1.0

    @property
    def request_ratio_ranges(self) -> tuple[tuple[float, float], ...]:
        """The ratios that a request may choose, as inclusive ranges (low, high); the engine's own comes first."""
        return ((self.mean_ratio, self.mean_ratio), *parse_ratios(self.request_ratios))

    def allows_ratio(self, ratio: float) -> bool:
        """Whether a request may choose this retention ratio."""
        return any(low <= ratio <= high for low, high in self.request_ratio_ranges)

    @property
    def all_ratios(self) -> list[float]:
        """Every ratio that a request can be served with, the engine's own first; a range counts in hundredths."""
        ratios: list[float] = []
        for low, high in self.request_ratio_ranges:
            hundredths = (n / 100 for n in range(ceil(100 * low), floor(100 * high) + 1))
            ratios += [low, *hundredths, high] if low < high else [low]
        return list(dict.fromkeys(ratios))

    def nearest_ratio(self, ratio: float) -> float:
        """The ratio in `all_ratios`, for which kernels are compiled at start-up, that is closest to this one.

        A ratio that requests may not choose is returned unchanged.
        """
        if not self.allows_ratio(ratio):
            return ratio
        return min(self.all_ratios, key=lambda other: abs(other - ratio))

    @property
    def request_method_options(self) -> dict[str, Mapping[str, Any]]:
        """The methods that a request may choose besides the engine's own, and their options."""
        return parse_methods(self.request_methods)

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that a request can be served with, the engine's own first."""
        return (self.method, *self.request_method_options)

    def of_method(self, name: str) -> KvConfig:
        """The configuration of an engine that serves only this one of `methods`."""
        own = name == self.method
        options = self.method_options if own else self.request_method_options[name]
        return replace(self, method=name, method_options=options, request_methods="")

    @property
    def query_span(self) -> int:
        """Number of newest tokens whose queries are kept: a window plus the buffer."""
        return self.window_size + self.buffer_size

    @property
    def num_queries(self) -> int:
        """Queries kept per head and request: every `query_stride`-th of the span."""
        return self.query_span // self.query_stride

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> KvConfig:
        """Build from a mapping, such as `additional_config["kvllm"]`; an unknown key is refused by name.

        The key `compression` stands for the options of one of the `PRESETS`.
        """
        if not isinstance(options, Mapping):
            raise UsageError(f"kvllm={options!r}: expected a mapping of options, such as {{'retention_ratio': 0.3}}.")
        return cls(**with_preset({str(name): value for name, value in options.items()}))

    @classmethod
    def from_json(cls, text: str) -> KvConfig:
        """Build from a JSON object in a string."""
        return cls.from_dict(parse_json("kvllm", text))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that `from_dict` takes back and JSON can hold."""
        plain: Any = {name: dict(value) for name, value in vars(self).items() if isinstance(value, Mapping)}
        return asdict(replace(self, **plain))


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """Expand the preset that the options name, if any; UsageError if it is unknown or contradicts another option."""
    rest = dict(options)
    name = rest.pop(PRESET_KEY, None)
    if name is None:
        return rest
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"{PRESET_KEY}={name!r}: use one of {', '.join(PRESETS)}, or set the options one by one.")
    preset = PRESETS[name]
    for option, value in preset.items():
        if rest.get(option, value) != value:
            raise UsageError(
                f"{PRESET_KEY}={name}: sets {option}={value}, but {option}={rest[option]} was given too. Leave one of "
                "them out."
            )
    return {**rest, **preset}


def check_retention_ratio(value: object, name: str = "retention_ratio") -> float:
    """Return `value` as a float; raise UsageError, under `name`, unless it is a number in (0, 1]."""
    return check_value(RETENTION_RATIO, name, value)


_NUMBER = r"(\d+\.?\d*|\.\d+)"
_RATIO_OR_RANGE = re.compile(rf"\s*{_NUMBER}\s*(?:-\s*{_NUMBER}\s*)?")


def parse_ratios(text: str) -> tuple[tuple[float, float], ...]:
    """The inclusive ranges (low, high) of `request_ratios`, such as "0.2-0.5,1.0"; a single ratio is both ends.

    Raises UsageError for anything else, and for ratios outside (0, 1].
    """
    ranges = []
    for item in text.split(",") if text.strip() else ():
        match = _RATIO_OR_RANGE.fullmatch(item)
        if match is None:
            raise UsageError(
                f"request_ratios={text!r}: {item!r} is neither a ratio nor a range LOW-HIGH; use for instance "
                "'0.2-0.5,1.0', or '' to allow none."
            )
        low, high = (float(number) for number in (match[1], match[2] or match[1]))
        for end in (low, high):
            check_retention_ratio(end, f"request_ratios={text!r}: ratio")
        if low > high:
            raise UsageError(f"request_ratios={text!r}: the range {item.strip()} ends below its start; swap its ends.")
        ranges.append((low, high))
    return tuple(ranges)


def parse_methods(given: str | Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The names in `request_methods` and the options of each; whether they exist, `kvllm.methods` checks."""
    if isinstance(given, str):
        names = [item.strip() for item in given.split(",")] if given.strip() else []
        if "" in names:
            raise UsageError(
                f"request_methods={given!r}: a name is missing beside a comma; use for instance 'random,keydiff', or "
                "'' to allow none."
            )
        return dict.fromkeys(names, {})
    for name, options in given.items():
        if not isinstance(options, Mapping):
            raise UsageError(
                f"request_methods={given!r}: {name}={options!r}: must be a mapping of the method's options; use {{}} "
                "for its defaults."
            )
    return dict(given)
