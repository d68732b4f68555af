"""Where the tokens of a request are in the cache: the arithmetic of docs/design.md, section 3, and nothing else.

Logical indices count the tokens of the text, physical indices those that are still in the KV cache. Both follow from
the prompt length and the number of computed tokens alone, so scheduler and worker never exchange a layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kvllm.config import KvConfig, check_retention_ratio
from kvllm.errors import UsageError, within

IntArray = npt.NDArray[np.int64]
Int = TypeVar("Int", int, IntArray)

NEVER = 1 << 40  # an event that no request reaches


def ceil_div(a: Int, b: int) -> Int:
    return -(-a // b)


class Shape(NamedTuple):
    """Token counts of one event: the survivors and raw tokens that it reads, and the tokens that it keeps."""

    num_history: int
    num_raw: int
    num_kept: int

    @property
    def num_candidates(self) -> int:
        return self.num_history + self.num_raw


class Fitting(ABC):
    """How long a text fits into a pool, given the most blocks that a request ever holds."""

    @abstractmethod
    def peak_blocks(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """The most blocks that a request ever holds while it grows to `num_tokens`."""

    def max_tokens_that_fit(
        self,
        num_prompt_tokens: int,
        num_blocks: int,
        beside: Callable[[int], int] = lambda num_tokens: 0,
        own: Callable[[int], int] | None = None,
    ) -> int:
        """Maximum text length (prompt included) of a single request with `num_blocks` blocks; 0 if none fits.

        beside: further blocks that a text of the given length needs
        own:    the most blocks that the request holds while it grows to the given length; default: `peak_blocks`
        """

        def needed(num_tokens: int) -> int:
            most = own(num_tokens) if own else self.peak_blocks(num_prompt_tokens, num_tokens)
            return most + beside(num_tokens)

        shortest = num_prompt_tokens + 1
        return most_that_fits(needed, shortest, num_blocks) if needed(shortest) <= num_blocks else 0


@dataclass(frozen=True)
class Geometry(Fitting):
    """The sizes of one configuration, in tokens; all but the buffer are multiples of the block size.

    A request's cache has two segments: the prefix (the prompt, then all survivors) and the tail (the raw tokens):

        logical text   [ prompt | window 0 | window 1 | window 2 | newest ... ]
        physical       [ prompt | survivors ][ newest ... ]
                         prefix segment        tail segment

    A compression ("event") reads the first `interval` raw tokens (event 0 reads `first_extra` more) and keeps
    `kept_blocks` of their blocks on average: each window's count is rounded so that the sum stays within half a block
    of the exact value. Event k of a request happens at the first step that starts with
    `protected_len + first_extra + (k + 1) * interval + buffer_size` computed tokens.

    With a limit on the survivors, the event that would exceed it (event `first_cut`, then every `cycle`-th) also reads
    all survivors, and keeps `history_kept` tokens in all. Under the budget policy every event does so.

    With a `prompt_budget`, event 0 also cuts a longer prompt to that many tokens.

    If survivors are packed, each of their blocks holds `packed_tokens` of them. Lengths still count such a block as
    `block_size` tokens, the space that it takes; `Shape.num_kept` counts the survivors themselves.
    """

    block_size: int
    interval: int
    buffer_size: int
    kept_blocks: Fraction  # blocks that an event keeps of its raw tokens, on average
    first_extra: int = 0
    first_cut: int = NEVER
    cycle: int = 1
    history_kept: int = 0
    prompt_budget: int = 0  # 0: prompts stay whole
    packed_tokens: int | None = None  # None: survivors' blocks are plain

    @classmethod
    def from_config(
        cls,
        config: KvConfig,
        block_size: int,
        retention_ratio: float | None = None,
        packed_tokens: int | None = None,
    ) -> Geometry | None:
        """The geometry of `config`, or None if nothing is compressed (ratio 1.0).

        packed_tokens: survivors per block, if they are packed
        Raises UsageError, naming option, value and remedy, if the sizes do not fit the block size.
        """
        if retention_ratio is None and config.budgets:
            raise ValueError("a table of ratios stands for several geometries: use request_geometry")
        ratio = check_retention_ratio(config.retention_ratio if retention_ratio is None else retention_ratio)
        if ratio >= 1.0:
            return None
        _check_multiple("prompt_budget", config.prompt_budget, block_size)
        if config.policy == "budget":
            return cls._budget(config, block_size)
        _check_multiple("window_size", config.window_size, block_size)
        kept = _kept_blocks(ratio, config.window_size, block_size, packed_tokens or block_size)
        limit = _history_limit(config.history_size, kept, block_size) if config.history_size else {}
        return cls(
            block_size=block_size,
            interval=config.window_size,
            buffer_size=config.buffer_size,
            kept_blocks=kept,
            prompt_budget=config.prompt_budget,
            packed_tokens=packed_tokens,
            **limit,
        )

    @classmethod
    def _budget(cls, config: KvConfig, block_size: int) -> Geometry:
        for name in ("budget_size", "budget_interval"):
            _check_multiple(name, getattr(config, name), block_size)
        most = config.budget_size + config.budget_interval
        if config.window_size > most:
            raise UsageError(
                f"window_size={config.window_size}: with policy=budget, scoring uses the queries of this many tokens "
                f"before the buffer, but only {most} are generated before the first cut; use at most {most}."
            )
        return cls(
            block_size=block_size,
            interval=config.budget_interval,
            buffer_size=config.buffer_size,
            kept_blocks=Fraction(0),
            first_extra=config.budget_size,
            first_cut=0,
            history_kept=config.budget_size,
            prompt_budget=config.prompt_budget,
        )

    @property
    def tracks_survivors(self) -> bool:
        """Whether survivors become candidates again, so that their positions in the text must be remembered."""
        return self.first_cut < NEVER

    @property
    def most_survivors(self) -> int:
        """The largest number of survivors that an event reads; 0 if survivors never become candidates again."""
        return max(shape.num_history for shape in self.shapes()) if self.tracks_survivors else 0

    def shape(self, event: int) -> Shape:
        """The shape of event number `event`."""
        history = self.survivors(event) - self.num_left_alone(event)
        raw = self._consumed(event + 1) - self._consumed(event)
        return Shape(history, raw, self._held(self.num_kept_blocks(event)))

    def num_kept_blocks(self, event: int) -> int:
        """Number of blocks for the survivors of event number `event`."""
        return (self.survivors(event + 1) - self.num_left_alone(event)) // self.block_size

    def _held(self, num_blocks: int) -> int:
        """Survivors that `num_blocks` of their blocks hold."""
        return num_blocks * (self.packed_tokens or self.block_size)

    def shapes(self) -> dict[Shape, int]:
        """Every shape that an event can have, with its first event. All of them are compiled before serving."""
        events = []
        if self.kept_blocks:  # the rounding is periodic
            windows = np.arange(min(self.kept_blocks.denominator, self.first_cut) + 1)
            events += np.unique(np.diff(self._rounded(windows)), return_index=True)[1].tolist()
        if self.tracks_survivors:
            events += [self.first_cut, self.first_cut + self.cycle]
        return {self.shape(event): event for event in reversed(events)}

    def _cuts_history(self, event: int) -> bool:
        return event >= self.first_cut and (event - self.first_cut) % self.cycle == 0

    def _rounded(self, num_windows: Int) -> Int:
        """Tokens kept of `num_windows` windows: the exact share, rounded to whole blocks."""
        share, whole = self.kept_blocks.numerator, self.kept_blocks.denominator
        return (2 * num_windows * share + whole) // (2 * whole) * self.block_size

    def _consumed(self, num_events: Int) -> Int:
        """Raw tokens that the first `num_events` events read."""
        return (num_events > 0) * self.first_extra + num_events * self.interval

    def survivors(self, num_events: Int) -> Int:
        """Survivors after `num_events` events."""
        limited = num_events > self.first_cut
        since_cut = (num_events - self.first_cut - 1) % self.cycle
        return limited * (self.history_kept + self._rounded(since_cut)) + (1 - limited) * self._rounded(num_events)

    def protected_len(self, num_prompt_tokens: Int) -> Int:
        """P': the prompt, rounded up to whole blocks; never compressed, except as `prompt_shape` says."""
        return ceil_div(num_prompt_tokens, self.block_size) * self.block_size

    def prompt_len(self, num_prompt_tokens: Int, num_events: Int) -> Int:
        """Tokens that remain in the prompt's blocks after `num_events` events."""
        protected = self.protected_len(num_prompt_tokens)
        excess = protected - self.prompt_budget
        return protected - excess * (excess > 0) * (num_events > 0) * (self.prompt_budget > 0)

    def prompt_shape(self, num_prompt_tokens: int) -> Shape | None:
        """The shape of the prompt's cut, which is part of event 0; None if the prompt stays whole.

        The candidates are all P' tokens: the prompt's last block may end with generated ones.
        """
        protected = self.protected_len(num_prompt_tokens)
        return Shape(0, protected, self.prompt_budget) if 0 < self.prompt_budget < protected else None

    def prefix_len(self, num_prompt_tokens: Int, num_events: Int) -> Int:
        """Tokens in the prefix segment: the kept part of the prompt, then the survivors."""
        return self.prompt_len(num_prompt_tokens, num_events) + self.survivors(num_events)

    def tail_start(self, num_prompt_tokens: Int, num_events: Int) -> Int:
        """Logical index of the first raw token."""
        return self.protected_len(num_prompt_tokens) + self._consumed(num_events)

    def num_removed(self, num_prompt_tokens: Int, num_events: Int) -> Int:
        """Tokens that `num_events` events have removed from the cache."""
        return self.tail_start(num_prompt_tokens, num_events) - self.prefix_len(num_prompt_tokens, num_events)

    def num_freed(self, num_prompt_tokens: Int, event: Int) -> Int:
        """Tokens that event number `event` removes."""
        return self.num_removed(num_prompt_tokens, event + 1) - self.num_removed(num_prompt_tokens, event)

    def num_evicted(self, num_prompt_tokens: int, event: int) -> int:
        """Tokens that event number `event` evicts; equal to `num_freed` unless survivors are packed."""
        shapes = [self.shape(event), self.prompt_shape(num_prompt_tokens) if event == 0 else None]
        return sum(shape.num_candidates - shape.num_kept for shape in shapes if shape is not None)

    def num_events(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        """Events that have happened once a step that starts with this many computed tokens has begun."""
        grown = num_computed_tokens - self.protected_len(num_prompt_tokens)
        return self.events_in(grown)

    def events_in(self, grown: Int) -> Int:
        """The same, from the number of tokens computed after the prompt's blocks."""
        events = (grown - self.buffer_size - self.first_extra) // self.interval
        return events * (events > 0)

    def event_at(self, num_prompt_tokens: Int, event: Int) -> Int:
        """The number of computed tokens at which event number `event` (from 0) is due."""
        return self.tail_start(num_prompt_tokens, event + 1) + self.buffer_size

    def physical_len(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        """Tokens that a request holds in the cache."""
        events = self.num_events(num_prompt_tokens, num_computed_tokens)
        return num_computed_tokens - self.num_removed(num_prompt_tokens, events)

    def max_chunk(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        """The most tokens that the next step may compute without running past an event.

        So a recomputed request attends to the same cache as the first time, and needs no more blocks.
        """
        events = self.num_events(num_prompt_tokens, num_computed_tokens)
        return self.event_at(num_prompt_tokens, events) - num_computed_tokens

    def num_left_alone(self, event: int) -> int:
        """Survivors that event number `event` does not read; the tokens that it keeps follow them."""
        return 0 if self._cuts_history(event) else self.survivors(event)

    def candidate_start(self, num_prompt_tokens: int, event: int) -> int:
        """Tokens before the first candidate of event number `event`: the prompt and the survivors that it skips."""
        held = self._held(self.num_left_alone(event) // self.block_size)
        return self.prompt_len(num_prompt_tokens, event) + held

    def peak_tokens(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """The most tokens that a request ever holds while it grows to `num_tokens`: now, or just before an event."""
        events = self.num_events(num_prompt_tokens, num_tokens - 1)
        now = num_tokens - self.num_removed(num_prompt_tokens, events)
        if not events:
            return now
        last = events - 1
        fullest = {0, min(last, self.first_cut)}
        if last > self.first_cut:  # just before a later cut, or at the last event before it
            fullest.add(min(last, self.first_cut + self.cycle))
        at = (self.event_at(num_prompt_tokens, e) - self.num_removed(num_prompt_tokens, e) for e in fullest)
        return max(now, *at)

    def peak_blocks(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """The most blocks that a request ever holds while it grows to `num_tokens`."""
        return ceil_div(self.peak_tokens(num_prompt_tokens, num_tokens), self.block_size)

    def blocks_held(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        """Blocks that a request holds with this many computed tokens."""
        return ceil_div(self.physical_len(num_prompt_tokens, num_computed_tokens), self.block_size)

    def blocks_freed(self, num_prompt_tokens: Int, event: Int) -> Int:
        """Blocks that event number `event` frees."""
        return self.num_freed(num_prompt_tokens, event) // self.block_size

    @property
    def groups(self) -> tuple[Geometry, ...]:
        """The geometry of each compressed group of layers; here there is only one."""
        return (self,)


@dataclass(frozen=True)
class GroupedGeometry(Fitting):
    """The geometry of a request whose groups of layers have different retention ratios (`kvllm.budgets`).

    All groups have the same size and compress at the same time; only the number of kept tokens differs. Block counts
    are sums over the groups, token counts are means over them, rounded.
    """

    groups: tuple[Geometry, ...]

    def __post_init__(self) -> None:
        same = {(g.block_size, g.interval, g.buffer_size, g.first_extra, g.prompt_budget) for g in self.groups}
        if len(same) != 1:
            raise ValueError(f"groups of layers whose events differ: {same}")

    @property
    def block_size(self) -> int:
        return self.groups[0].block_size

    @property
    def interval(self) -> int:
        return self.groups[0].interval

    @property
    def buffer_size(self) -> int:
        return self.groups[0].buffer_size

    @property
    def prompt_budget(self) -> int:
        return self.groups[0].prompt_budget

    def shape(self, event: int) -> Shape:
        """The shape in the group that reads the most candidates."""
        return max((group.shape(event) for group in self.groups), key=lambda shape: shape.num_candidates)

    def prompt_shape(self, num_prompt_tokens: int) -> Shape | None:
        return self.groups[0].prompt_shape(num_prompt_tokens)

    def num_events(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        return self.groups[0].num_events(num_prompt_tokens, num_computed_tokens)

    def event_at(self, num_prompt_tokens: Int, event: Int) -> Int:
        return self.groups[0].event_at(num_prompt_tokens, event)

    def max_chunk(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        return self.groups[0].max_chunk(num_prompt_tokens, num_computed_tokens)

    def physical_len(self, num_prompt_tokens: int, num_computed_tokens: int) -> int:
        """Tokens that a request holds in the cache of a layer, on average."""
        lengths = [group.physical_len(num_prompt_tokens, num_computed_tokens) for group in self.groups]
        return round(sum(lengths) / len(lengths))

    def blocks_held(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        held: Int = num_computed_tokens * 0
        for group in self.groups:
            held = held + group.blocks_held(num_prompt_tokens, num_computed_tokens)
        return held

    def blocks_freed(self, num_prompt_tokens: Int, event: Int) -> Int:
        freed: Int = event * 0
        for group in self.groups:
            freed = freed + group.blocks_freed(num_prompt_tokens, event)
        return freed

    def peak_blocks(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """The sum of the groups' peaks. vLLM counts the same, by asking each group's manager.

        Groups may peak at different times, so this can be a few blocks more than a request ever holds.
        """
        return sum(group.peak_blocks(num_prompt_tokens, num_tokens) for group in self.groups)

    def num_evicted(self, num_prompt_tokens: int, event: int) -> int:
        evicted = [group.num_evicted(num_prompt_tokens, event) for group in self.groups]
        return round(sum(evicted) / len(evicted))


# With one group of layers, or with several.
RequestGeometry = Geometry | GroupedGeometry


def request_geometry(
    config: KvConfig, block_size: int, retention_ratio: float | None = None, packed_tokens: int | None = None
) -> RequestGeometry | None:
    """The geometry of a request under `config`; None if nothing is compressed (ratio 1.0).

    retention_ratio: replaces the configured ratio in all layers; the mean of a configured table selects that table
    The other parameters and the errors are those of `Geometry.from_config`.
    """
    if not config.budgets or retention_ratio not in (None, config.mean_ratio):
        return Geometry.from_config(config, block_size, retention_ratio, packed_tokens)
    made = []
    for budget, part in zip(config.budgets, config.parts, strict=True):
        with within(f"layers {budget.key}"):
            made.append(Geometry.from_config(part, block_size, packed_tokens=packed_tokens))
    return GroupedGeometry(tuple(group for group in made if group is not None))


def most_that_fits(needed: Callable[[int], int], low: int, num_blocks: int) -> int:
    """The largest n >= `low` with needed(n) <= num_blocks; `needed` must be non-decreasing, and `low` must fit."""
    high = low + 1
    while needed(high) <= num_blocks and high < 1 << 40:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= num_blocks else (low, middle)
    return low


def _kept_blocks(retention_ratio: float, window_size: int, block_size: int, held: int) -> Fraction:
    """Blocks of `held` tokens that a window keeps on average; UsageError if it would keep less than one."""
    # Exact for decimal fractions, and small enough that the sums of `Geometry` fit in 64 bits.
    ratio = max(Fraction(retention_ratio).limit_denominator(10_000), Fraction(1, 10_000))
    fitting = ceil_div(max(2 * block_size, ceil(held / ratio)), block_size) * block_size
    if window_size < 2 * block_size:
        raise UsageError(
            f"window_size={window_size}: with blocks of {block_size} tokens no block could be freed; "
            f"use at least {fitting}, or a smaller --block-size."
        )
    kept = ratio * Fraction(window_size, held)
    if kept < 1:
        raise UsageError(
            f"retention_ratio={retention_ratio}: every window keeps at least one block of {held} tokens, which is "
            f"{held / window_size:.3g} of window_size={window_size}. Use at least that ratio, or a window_size of "
            f"at least {fitting}{_smaller_blocks(block_size, held)}."
        )
    most = window_size // held
    if kept > most and held > block_size:
        raise UsageError(
            f"retention_ratio={retention_ratio}: packed blocks hold {held} tokens each, so window_size={window_size} "
            f"fills at most {most} of them. Use at most {_rounded_down(most * held / window_size)}"
            f"{_smaller_blocks(block_size, held)}, or survivor_bits=16."
        )
    return kept


def _smaller_blocks(block_size: int, held: int) -> str:
    """A further remedy, if packed blocks are large because plain ones are."""
    return ", or --block-size 16" if held > block_size > 16 else ""


def _rounded_down(ratio: float) -> float:
    return int(ratio * 10_000) / 10_000


def _history_limit(history_size: int, kept_blocks: Fraction, block_size: int) -> dict[str, int]:
    """When survivors are compressed again, and how many are kept then: three quarters of the limit."""
    limit = history_size // block_size

    def windows_in(blocks: int) -> int:
        """The most windows whose rounded share fits: the largest n with n * kept_blocks < blocks + 1/2."""
        return ceil((blocks + Fraction(1, 2)) / kept_blocks) - 1

    first_cut = windows_in(limit)
    if first_cut < 1:
        one = int(kept_blocks + Fraction(1, 2)) * block_size
        raise UsageError(
            f"history_size={history_size}: one window alone leaves {one} survivors. Use at least {one}, a lower "
            "retention_ratio, or 0 for no limit."
        )
    kept = max(1, 3 * limit // 4)
    return {"first_cut": first_cut, "cycle": windows_in(limit - kept) + 1, "history_kept": kept * block_size}


def _check_multiple(name: str, value: int, block_size: int) -> None:
    if value % block_size:
        nearest = ceil_div(value, block_size) * block_size
        raise UsageError(
            f"{name}={value}: must be a multiple of the KV block size, {block_size} tokens; "
            f"use {nearest}, or choose a --block-size that divides {value}."
        )
