"""Where the tokens of a request are: the arithmetic of docs/design.md, section 2, and nothing else.

Logical indices count the tokens of the text; physical ones count what is left of them in the KV cache. Both follow
from the prompt length and the number of computed tokens alone, so scheduler and worker never exchange a layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kvllm.config import KvConfig, check_retention_ratio

IntArray = npt.NDArray[np.int64]
Int = TypeVar("Int", int, IntArray)


def ceil_div(a: Int, b: int) -> Int:
    return -(-a // b)


class Shape(NamedTuple):
    """What one event does to a request: tokens that it looks at, tokens that it leaves."""

    num_candidates: int
    num_kept: int


@dataclass(frozen=True)
class Geometry:
    """The sizes of one configuration with vLLM's block size, in tokens; all but the buffer are whole blocks.

    A compression ("event") turns `num_candidates` neighbouring physical tokens into `num_kept`, in the first blocks
    of their own space, and frees the rest. Event k of a request happens at the first step that starts with
    `protected_len + num_candidates + k * interval + buffer_size` computed tokens.

    window policy: num_candidates = interval = W, and event k takes window k.
    budget policy: num_candidates = B + D, interval = D, and every event takes all generated tokens but the buffer.

    The survivors so far are the history, `num_kept` of them a group. With a `history_limit` (window policy only, whole
    groups) an event that would take the history past it has the whole history among its candidates, besides its window.
    It keeps `history_kept` tokens, whole groups again, in the space of the first groups. So the history is at its limit
    again exactly `cycle` events later, and events have two shapes.

    With a `prompt_budget` event 0 also turns the prompt, where it is longer, into that many tokens, in the first blocks
    of its own space. From then on the rest stands where a prompt of that length would have put it.
    """

    block_size: int
    policy: str
    num_candidates: int
    num_kept: int
    interval: int
    buffer_size: int
    history_limit: int = 0  # 0: no limit
    history_kept: int = 0
    prompt_budget: int = 0  # 0: prompts stay whole

    @classmethod
    def from_config(cls, config: KvConfig, block_size: int, retention_ratio: float | None = None) -> Geometry | None:
        """The geometry of `config`, or None where nothing is compressed (ratio 1.0).

        Raises ValueError, naming option, value and remedy, where the sizes do not fit the block size.
        """
        ratio = check_retention_ratio(config.retention_ratio if retention_ratio is None else retention_ratio)
        if ratio >= 1.0:
            return None
        _check_multiple("prompt_budget", config.prompt_budget, block_size)
        if config.policy == "budget":
            for name in ("budget_size", "budget_interval"):
                _check_multiple(name, getattr(config, name), block_size)
            most = config.budget_size + config.budget_interval
            if config.window_size > most:
                raise ValueError(
                    f"window_size={config.window_size}: with policy=budget it says how many tokens' queries score "
                    f"besides the buffer's, and only {most} others are generated before the first cut; use {most} or "
                    "less."
                )
            return cls(
                block_size=block_size,
                policy="budget",
                num_candidates=config.budget_size + config.budget_interval,
                num_kept=config.budget_size,
                interval=config.budget_interval,
                buffer_size=config.buffer_size,
                prompt_budget=config.prompt_budget,
            )
        _check_multiple("window_size", config.window_size, block_size)
        kept = num_kept(ratio, config.window_size, block_size)
        groups, kept_groups = history_groups(config.history_size, kept)
        return cls(
            block_size=block_size,
            policy="window",
            num_candidates=config.window_size,
            num_kept=kept,
            interval=config.window_size,
            buffer_size=config.buffer_size,
            history_limit=groups * kept,
            history_kept=kept_groups * kept,
            prompt_budget=config.prompt_budget,
        )

    @property
    def cycle(self) -> int:
        """Events from one compression of the history to the next."""
        return (self.history_limit - self.history_kept) // self.num_kept + 1

    @property
    def first_of_each_shape(self) -> tuple[int, ...]:
        """The first event of each shape that events have."""
        return (0, self.history_limit // self.num_kept) if self.history_limit else (0,)

    @property
    def tracks_survivors(self) -> bool:
        """Whether survivors become candidates again, so that their places in the text must be remembered."""
        return self.policy == "budget" or self.history_limit > 0

    def shape(self, event: int) -> Shape:
        """What event number `event` does."""
        if self._compresses_history(event):
            return Shape(self.history_limit + self.num_candidates, self.history_kept)
        return Shape(self.num_candidates, self.num_kept)

    def _compresses_history(self, event: int) -> bool:
        return self.num_dropped_groups(event + 1) > self.num_dropped_groups(event)

    def num_dropped_groups(self, num_events: Int) -> Int:
        """Groups that a history limit has cost a request after `num_events` events; whole cycles."""
        if not self.history_limit:
            return 0 * num_events
        excess = num_events - self.history_limit // self.num_kept
        return ceil_div(excess * (excess > 0), self.cycle) * self.cycle

    def num_groups(self, num_events: Int) -> Int:
        """Groups in the history after `num_events` events."""
        if self.policy == "budget":
            return 1 * (num_events > 0)
        return num_events - self.num_dropped_groups(num_events)

    def num_removed(self, num_prompt_tokens: Int, num_events: Int) -> Int:
        """Tokens that `num_events` events have taken out of the cache."""
        dropped = self.num_dropped_groups(num_events) * self.num_kept
        cut = self.num_prompt_removed(num_prompt_tokens, num_events)
        return num_events * (self.num_candidates - self.num_kept) + dropped + cut

    def num_prompt_removed(self, num_prompt_tokens: Int, num_events: Int) -> Int:
        """Tokens of the prompt among them."""
        excess = self.protected_len(num_prompt_tokens) - self.prompt_budget
        return excess * (excess > 0) * (num_events > 0) * (self.prompt_budget > 0)

    def num_freed(self, num_prompt_tokens: Int, event: Int) -> Int:
        """Tokens that event number `event` frees."""
        return self.num_removed(num_prompt_tokens, event + 1) - self.num_removed(num_prompt_tokens, event)

    def protected_len(self, num_prompt_tokens: Int) -> Int:
        """P': the prompt, rounded up to whole blocks; never compressed, but for `prompt_shape`."""
        return ceil_div(num_prompt_tokens, self.block_size) * self.block_size

    def prompt_shape(self, num_prompt_tokens: int) -> Shape | None:
        """What event 0 does to the prompt, besides its own shape; None where the prompt stays whole.

        The candidates are all P' tokens: the last block of the prompt may end with generated ones.
        """
        protected = self.protected_len(num_prompt_tokens)
        return Shape(protected, self.prompt_budget) if 0 < self.prompt_budget < protected else None

    def num_events(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        """How many compressions a request has behind it once the step that starts with this many tokens has begun."""
        grown = num_computed_tokens - self.protected_len(num_prompt_tokens) - self.buffer_size - self.num_candidates
        events = grown // self.interval + 1
        return events * (events > 0)

    def event_at(self, num_prompt_tokens: Int, event: Int) -> Int:
        """The number of computed tokens at which event number `event` (from 0) is due."""
        return self.protected_len(num_prompt_tokens) + self.num_candidates + event * self.interval + self.buffer_size

    def physical_len(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        """Tokens that a request holds in the cache."""
        events = self.num_events(num_prompt_tokens, num_computed_tokens)
        return num_computed_tokens - self.num_removed(num_prompt_tokens, events)

    def max_chunk(self, num_prompt_tokens: Int, num_computed_tokens: Int) -> Int:
        """Most tokens the next step may compute: none runs past an event.

        So a request that is prefilled again sees what it saw the first time, and needs no more blocks than it did.
        """
        events = self.num_events(num_prompt_tokens, num_computed_tokens)
        return self.event_at(num_prompt_tokens, events) - num_computed_tokens

    def peak_blocks(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Most blocks a request ever holds while it grows to `num_tokens`: now, or just before an event.

        The event is the last one, or the first that compressed the history: none finds more than that one. Or it is
        event 0, which finds the whole prompt.
        """
        events = self.num_events(num_prompt_tokens, num_tokens - 1)
        now = num_tokens - self.num_removed(num_prompt_tokens, events)
        if not events:
            return ceil_div(now, self.block_size)
        largest = min(events - 1, self.history_limit // self.num_kept) if self.history_limit else events - 1
        before = self.event_at(num_prompt_tokens, largest) - self.num_removed(num_prompt_tokens, largest)
        return ceil_div(max(now, before, self.event_at(num_prompt_tokens, 0)), self.block_size)

    def freed_blocks(self, num_prompt_tokens: int, event: int) -> list[range]:
        """Logical blocks that event number `event` empties, all of them in use until then: ascending runs."""
        start = self.protected_len(num_prompt_tokens)
        own = range(start + event * self.interval, start + event * self.interval + self.num_candidates)
        if not self._compresses_history(event):
            runs = [own[self.num_kept :]]
        else:
            windows = (start + w * self.interval for w in range(event - self.cycle + 1, event))
            runs = [*(range(first, first + self.num_kept) for first in windows), own]
        if event == 0 and (prompt := self.prompt_shape(num_prompt_tokens)):
            runs.insert(0, range(prompt.num_kept, prompt.num_candidates))
        return [range(run.start // self.block_size, run.stop // self.block_size) for run in runs]

    def candidate_offset(self, event: int) -> int:
        """Survivors in front of the first candidate of event number `event`."""
        takes_all = self.policy == "budget" or self._compresses_history(event)
        return 0 if takes_all else self.num_groups(event) * self.num_kept

    def candidate_start(self, num_prompt_tokens: int, event: int) -> int:
        """Physical index, just before event number `event`, of its first candidate."""
        cut = self.num_prompt_removed(num_prompt_tokens, event)
        return self.protected_len(num_prompt_tokens) - cut + self.candidate_offset(event)

    def candidate_blocks(self, num_prompt_tokens: int, event: int) -> list[int]:
        """Logical blocks of the candidates of event number `event`: `block_map`'s, in plain numbers."""
        kept, step = self.num_kept // self.block_size, self.interval // self.block_size
        start = self.protected_len(num_prompt_tokens) // self.block_size
        takes_all = self.policy == "budget" or self._compresses_history(event)
        groups, dropped = self.num_groups(event) if takes_all else 0, self.num_dropped_groups(event)
        stay = self.history_kept // self.num_kept
        windows = (group if group < stay else group + dropped for group in range(groups))
        survivors = [start + window * step + block for window in windows for block in range(kept)]
        num_raw = self.shape(event).num_candidates // self.block_size - len(survivors)
        # What lies between has been candidates before.
        first = start + (self.num_candidates // self.block_size + (event - 1) * step if event else 0)
        return [*survivors, *range(first, first + num_raw)]

    def block_map(self, num_prompt_tokens: IntArray, num_events: IntArray, num_blocks: int) -> IntArray:
        """Logical block behind each physical block.

        num_prompt_tokens, num_events: [num_reqs]
        returns [num_reqs, num_blocks]; entries past a request's length go on counting, and mean nothing
        """
        kept, candidates, step = (n // self.block_size for n in (self.num_kept, self.num_candidates, self.interval))
        prompt, events = num_prompt_tokens[:, None], num_events[:, None]
        protected = self.protected_len(prompt) // self.block_size
        front = protected - self.num_prompt_removed(prompt, events) // self.block_size
        physical = np.arange(num_blocks, dtype=np.int64)[None, :] - front
        groups = self.num_groups(events)
        group = physical // kept
        # The first groups never move; those that came after the history was compressed stand behind what it dropped.
        window = group + np.where(group < self.history_kept // self.num_kept, 0, self.num_dropped_groups(events))
        survivor = window * step + physical % kept
        raw = physical - groups * kept + np.where(events > 0, candidates + (events - 1) * step, 0)
        generated = np.where(physical < groups * kept, survivor, raw)
        return np.where(physical < 0, front + physical, protected + generated)

    def max_tokens_that_fit(self, num_prompt_tokens: int, num_blocks: int) -> int:
        """Longest text (prompt included) that one request may reach with `num_blocks` blocks; 0 if none."""
        if self.peak_blocks(num_prompt_tokens, num_prompt_tokens + 1) > num_blocks:
            return 0
        low, high = num_prompt_tokens + 1, num_prompt_tokens + 2
        while self.peak_blocks(num_prompt_tokens, high) <= num_blocks and high < 1 << 40:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_blocks(num_prompt_tokens, middle) <= num_blocks else (low, middle)
        return low


def num_kept(retention_ratio: float, window_size: int, block_size: int) -> int:
    """K: survivors of a window, `retention_ratio * window_size` rounded to whole blocks.

    Raises ValueError where no block or no saving would be left.
    """
    if window_size < 2 * block_size:
        raise ValueError(
            f"window_size={window_size}: with blocks of {block_size} tokens nothing could be freed; "
            f"use at least {2 * block_size}, or a smaller --block-size."
        )
    blocks = _kept_blocks(retention_ratio, window_size, block_size)
    if not 0 < blocks < window_size // block_size:
        lowest, highest = block_size / window_size, 1 - block_size / window_size
        what = "no block" if blocks == 0 else "every block"
        raise ValueError(
            f"retention_ratio={retention_ratio}: with window_size={window_size} and blocks of {block_size} tokens "
            f"this keeps {what} of a window. Use a ratio from {lowest:.3g} to {highest:.3g}, a larger window_size or "
            "a smaller --block-size; 1.0 turns compression off."
        )
    return blocks * block_size


def _kept_blocks(retention_ratio: float, window_size: int, block_size: int) -> int:
    """The one place that rounds."""
    return int(retention_ratio * window_size / block_size + 0.5)


def is_rounded(retention_ratio: float, window_size: int, num_kept: int, limit: float = 0.1) -> bool:
    """Whether whole blocks change the ratio by more than this share of it; more than a tenth is worth a word."""
    return abs(num_kept / window_size - retention_ratio) > limit * retention_ratio


def fitting_window_size(retention_ratio: float, window_size: int, block_size: int) -> int:
    """The nearest window size of which whole blocks are this ratio to within a twentieth; the larger one of two."""
    blocks = window_size // block_size
    nearest = (n * block_size for n in sorted(range(2, 2 * blocks + 100), key=lambda n: (abs(n - blocks), -n)))
    return next(
        size
        for size in nearest
        if not is_rounded(
            retention_ratio, size, block_size * _kept_blocks(retention_ratio, size, block_size), limit=0.05
        )
    )


def history_groups(history_size: int, num_kept: int) -> tuple[int, int]:
    """Groups of `num_kept` survivors that the history may hold, and that stay when it is compressed; (0, 0): no limit.

    Three quarters stay, rounded down: of a limit of two groups or more at least one is free for the next window.
    Raises ValueError where not even one window's survivors fit.
    """
    if not history_size:
        return 0, 0
    groups = history_size // num_kept
    if not groups:
        raise ValueError(
            f"history_size={history_size}: one window alone leaves {num_kept} survivors. Use at least {num_kept}, a "
            "lower retention_ratio, or 0 for no limit."
        )
    return groups, max(1, 3 * groups // 4)


def _check_multiple(name: str, value: int, block_size: int) -> None:
    if value % block_size:
        nearest = ceil_div(value, block_size) * block_size
        raise ValueError(
            f"{name}={value}: must be a multiple of the KV block size, {block_size} tokens; "
            f"use {nearest}, or choose a --block-size that divides {value}."
        )
