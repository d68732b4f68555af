"""What a user can set: one validated dataclass, shared by the engine, the reference, the CLI and the server."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil, floor
from typing import Any

from kvllm.methods import check_method

POLICIES = ("window", "budget")


@dataclass(frozen=True, kw_only=True)
class KvConfig:
    """The one home of these defaults: every front end takes its options from here.

    Sizes are in tokens. A `retention_ratio` of 1.0 turns compression off. The block size is vLLM's and known only
    once an engine exists, so what depends on it is checked by `kvllm.layout.Geometry`.
    """

    method: str = field(default="kara", metadata={"help": "Method that scores and selects; see `kvllm methods`."})
    method_options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "The method's own options, as JSON."}
    )
    policy: str = field(
        default="window",
        metadata={"help": "window: each window is compressed once; budget: cut to `budget_size`, again and again."},
    )
    retention_ratio: float = field(
        default=0.3, metadata={"help": "Share of a window that survives, in (0, 1]; 1.0 = no compression."}
    )
    request_ratios: str = field(
        default="",
        metadata={
            "help": "Ratios that requests may choose with kv_retention_ratio besides the engine's own: single ratios "
            "and ranges, such as 0.2-0.5,1.0. Empty: none."
        },
    )
    window_size: int = field(
        default=256, metadata={"help": "Tokens compressed at once; a multiple of vLLM's block size."}
    )
    buffer_size: int = field(default=128, metadata={"help": "Newest tokens, never compressed."})
    max_chunk_size: int = field(default=8, metadata={"help": "Longest chunk that Token2Chunk grows; 1 = none."})
    query_stride: int = field(
        default=8, metadata={"help": "Each head keeps the query of every n-th token for scoring."}
    )
    history_size: int = field(
        default=0,
        metadata={
            "help": "policy=window: tokens kept of old windows, at most; then they are compressed again. 0 = no limit."
        },
    )
    budget_size: int = field(
        default=2048, metadata={"help": "policy=budget: generated tokens kept; a multiple of the block size."}
    )
    budget_interval: int = field(
        default=128, metadata={"help": "policy=budget: tokens between two cuts; a multiple of the block size."}
    )
    prompt_budget: int = field(
        default=0,
        metadata={
            "help": "Tokens that survive of a longer prompt, cut at the request's first compression; a multiple of the "
            "block size. 0 = prompts stay whole."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the methods that draw at random."})

    def __post_init__(self) -> None:
        check_retention_ratio(self.retention_ratio)
        self._check_types()
        parse_ratios(self.request_ratios)
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r}: must be one of {', '.join(POLICIES)}.")
        for name in ("window_size", "buffer_size", "max_chunk_size", "query_stride", "budget_size", "budget_interval"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive, a number of tokens.")
        if self.history_size < 0:
            raise ValueError(f"history_size={self.history_size}: must be a number of tokens, or 0 for no limit.")
        if self.prompt_budget < 0:
            raise ValueError(
                f"prompt_budget={self.prompt_budget}: must be a number of tokens, or 0: prompts stay whole."
            )
        if self.history_size and self.policy != "window":
            raise ValueError(
                f"history_size={self.history_size}: only for policy=window; with policy={self.policy} the memory is "
                "bounded by budget_size. Leave history_size at 0, or use policy=window."
            )
        for name in self._aligned_to_stride():
            if getattr(self, name) % self.query_stride:
                raise ValueError(
                    f"query_stride={self.query_stride}: must divide {name}={getattr(self, name)}, "
                    f"so that every window is scored by the same number of queries; try a power of two."
                )
        check_method(self)

    def _aligned_to_stride(self) -> tuple[str, ...]:
        if self.policy == "window":
            return ("window_size", "buffer_size")
        return ("window_size", "buffer_size", "budget_size", "budget_interval")

    def _check_types(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            expected = {"str": str, "int": int, "float": (int, float)}.get(str(f.type), Mapping)
            if not isinstance(value, expected) or isinstance(value, bool):  # type: ignore[arg-type]
                raise ValueError(f"{f.name}={value!r}: expected {f.type}.")

    @property
    def enabled(self) -> bool:
        """Whether requests are compressed unless they say otherwise."""
        return self.retention_ratio < 1.0

    @property
    def request_ratio_ranges(self) -> tuple[tuple[float, float], ...]:
        """The ratios that a request may choose, as inclusive ranges (low, high); the engine's own comes first."""
        return ((self.retention_ratio, self.retention_ratio), *parse_ratios(self.request_ratios))

    def allows_ratio(self, ratio: float) -> bool:
        """Whether a request may choose this retention ratio."""
        return any(low <= ratio <= high for low, high in self.request_ratio_ranges)

    @property
    def all_ratios(self) -> list[float]:
        """Every ratio that a request is served with, the engine's own first: of a range, its ends and hundredths."""
        ratios: list[float] = []
        for low, high in self.request_ratio_ranges:
            hundredths = (n / 100 for n in range(ceil(100 * low), floor(100 * high) + 1))
            ratios += [low, *hundredths, high] if low < high else [low]
        return list(dict.fromkeys(ratios))

    def nearest_ratio(self, ratio: float) -> float:
        """The one of `all_ratios` that a request with this ratio is served with; all of them are compiled at start.

        A ratio that requests may not choose is returned as it is.
        """
        if not self.allows_ratio(ratio):
            return ratio
        return min(self.all_ratios, key=lambda other: abs(other - ratio))

    @property
    def query_span(self) -> int:
        """Newest tokens that queries are kept of: as many as a window and the buffer have."""
        return self.window_size + self.buffer_size

    @property
    def num_queries(self) -> int:
        """Queries that each head keeps of a request: every `query_stride`-th of the span."""
        return self.query_span // self.query_stride

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> KvConfig:
        """Build from a mapping, such as `additional_config["kvllm"]`; an unknown key is refused by name."""
        if not isinstance(options, Mapping):
            raise ValueError(f"kvllm={options!r}: expected a mapping of options, such as {{'retention_ratio': 0.3}}.")
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"options are {', '.join(known)}."
                raise ValueError(f"kvllm has no option {key!r}; {hint}")
        return cls(**options)

    @classmethod
    def from_json(cls, text: str) -> KvConfig:
        """Build from a JSON object in a string."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as e:
            raise ValueError(f"kvllm options are not valid JSON ({e}): {text}") from e

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that `from_dict` takes back and JSON can hold."""
        return asdict(replace(self, method_options=dict(self.method_options)))


def check_retention_ratio(value: Any, name: str = "retention_ratio") -> float:
    """Return `value` as a float; raise ValueError unless it is a share in (0, 1]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        wrong_type = "" if is_number else f"expected a number, not {type(value).__name__}; "
        raise ValueError(
            f"{name}={value!r}: {wrong_type}this is the share that survives, in (0, 1]. To drop 30% of each window, "
            "use 0.7; to turn compression off, use 1.0."
        )
    return float(value)


_NUMBER = r"(\d+\.?\d*|\.\d+)"
_RATIO_OR_RANGE = re.compile(rf"\s*{_NUMBER}\s*(?:-\s*{_NUMBER}\s*)?")


def parse_ratios(text: str) -> tuple[tuple[float, float], ...]:
    """The inclusive ranges (low, high) of `request_ratios`, such as "0.2-0.5,1.0"; a single ratio is both ends.

    Raises ValueError for anything else, and for ratios outside (0, 1].
    """
    ranges = []
    for item in text.split(",") if text.strip() else ():
        match = _RATIO_OR_RANGE.fullmatch(item)
        if match is None:
            raise ValueError(
                f"request_ratios={text!r}: {item!r} is neither a ratio nor a range LOW-HIGH; write for instance "
                "'0.2-0.5,1.0', or '' to let requests choose nothing."
            )
        low, high = (float(number) for number in (match[1], match[2] or match[1]))
        for end in (low, high):
            check_retention_ratio(end, f"request_ratios={text!r}: ratio")
        if low > high:
            raise ValueError(f"request_ratios={text!r}: the range {item.strip()} ends below its start; swap its ends.")
        ranges.append((low, high))
    return tuple(ranges)
