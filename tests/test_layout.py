"""The closed forms of `layout` against a list that lives through every step of a request."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvllm.config import KvConfig
from kvllm.layout import Geometry, ceil_div, fitting_window_size, is_rounded, num_kept

SIMULATIONS = settings(max_examples=60, deadline=None)
ARITHMETIC = settings(max_examples=200, deadline=None)


@st.composite
def geometries(draw) -> Geometry:
    block = draw(st.sampled_from([1, 2, 4, 16]))
    buffer = draw(st.integers(1, 3 * block + 1))
    prompt = draw(st.integers(0, 3)) * block
    if draw(st.booleans()):
        blocks = draw(st.integers(2, 6))
        kept = draw(st.integers(1, blocks - 1))
        limit = draw(st.integers(0, 5))  # groups; 0: none
        stay = draw(st.integers(1, limit)) if limit else 0
        history = (limit * kept * block, stay * kept * block)
        return Geometry(block, "window", blocks * block, kept * block, blocks * block, buffer, *history, prompt)
    kept, interval = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    sizes = ((kept + interval) * block, kept * block, interval * block, buffer)
    return Geometry(block, "budget", *sizes, prompt_budget=prompt)


CUT = "prompt"


@dataclass
class Simulation:
    """One request, block by block: what the scheduler frees and the worker moves, with nothing computed ahead.

    `table` lists the logical blocks in the order in which attention reads them; `cache` holds one entry a cached
    token: its position, or None for a survivor, whose position depends on the head (CUT for one of the prompt).
    """

    geometry: Geometry
    num_prompt_tokens: int
    table: list[int] = field(default_factory=list)
    cache: list[int | str | None] = field(default_factory=list)
    computed: int = 0
    events: list[dict] = field(default_factory=list)
    peak: int = 0

    def compress_if_due(self) -> bool:
        g = self.geometry
        whole = ceil_div(self.num_prompt_tokens, g.block_size) * g.block_size
        protected = g.prompt_budget if self.events and 0 < g.prompt_budget < whole else whole
        history = self.cache[protected:].count(None)
        # The candidates are the first tokens that may be touched: all but the prompt's blocks and old windows.
        start = protected + (history if g.policy == "window" else 0)
        if len(self.cache) - start < g.num_candidates + g.buffer_size:
            return False
        candidates, kept = g.num_candidates, g.num_kept
        if g.history_limit and history + kept > g.history_limit:
            start, candidates, kept = protected, history + candidates, g.history_kept
        first, last = (start + kept) // g.block_size, (start + candidates) // g.block_size
        freed = self.table[first:last]
        event = {"at": self.computed, "start": start, "shape": (candidates, kept), "freed": freed}
        self.cache[start : start + candidates] = [None] * kept
        del self.table[first:last]
        if not self.events and 0 < g.prompt_budget < whole:
            cut = slice(g.prompt_budget // g.block_size, whole // g.block_size)
            event["freed"] = [*self.table[cut], *freed]
            self.cache[:whole] = [CUT] * g.prompt_budget
            del self.table[cut]
        self.events.append(event)
        return True

    def step(self, num_new: int) -> bool:
        """Compute `num_new` tokens; returns whether the step began with a compression."""
        compressed = self.compress_if_due()
        for position in range(self.computed, self.computed + num_new):
            self.cache.append(position)
            if position % self.geometry.block_size == 0:
                self.table.append(position // self.geometry.block_size)
        self.computed += num_new
        self.peak = max(self.peak, len(self.table))
        return compressed


def decode(geometry: Geometry, num_prompt_tokens: int, num_tokens: int):
    """Yield the simulation after its prefill, then after each decode step."""
    simulation = Simulation(geometry, num_prompt_tokens)
    simulation.step(num_prompt_tokens)
    yield simulation
    for _ in range(num_tokens - num_prompt_tokens):
        simulation.step(1)
        yield simulation


def enough_tokens(geometry: Geometry, num_prompt_tokens: int) -> int:
    """A length with at least three events behind it (with a history limit: two of its compressions) and some more."""
    protected = ceil_div(num_prompt_tokens, geometry.block_size) * geometry.block_size
    last = geometry.history_limit // geometry.num_kept + geometry.cycle if geometry.history_limit else 0
    first = protected + geometry.num_candidates + geometry.buffer_size
    return first + max(last, 2) * geometry.interval + geometry.block_size + 2


@SIMULATIONS
@given(geometries(), st.integers(1, 40))
def test_layout_equals_the_simulation(geometry, num_prompt_tokens):
    peak = 0
    for sim in decode(geometry, num_prompt_tokens, enough_tokens(geometry, num_prompt_tokens)):
        begun_at = sim.computed - 1  # tokens computed when the last step began
        events = geometry.num_events(num_prompt_tokens, begun_at)
        assert events == len(sim.events)
        assert geometry.physical_len(num_prompt_tokens, begun_at) == len(sim.cache) - 1
        mapped = geometry.block_map(np.array([num_prompt_tokens]), np.array([events]), len(sim.table))
        assert mapped[0].tolist() == sim.table
        assert len(sim.table) == ceil_div(len(sim.cache), geometry.block_size)
        if sim.computed > num_prompt_tokens:
            assert geometry.peak_blocks(num_prompt_tokens, sim.computed) == sim.peak
            assert sim.peak >= peak
        peak = sim.peak
    assert len(sim.events) >= 3
    for number, event in enumerate(sim.events):
        assert geometry.event_at(num_prompt_tokens, number) == event["at"]
        assert geometry.candidate_start(num_prompt_tokens, number) == event["start"]
        assert geometry.shape(number) == event["shape"]
        first, count = event["start"] // geometry.block_size, event["shape"][0] // geometry.block_size
        mapped = geometry.block_map(np.array([num_prompt_tokens]), np.array([number]), first + count)
        assert geometry.candidate_blocks(num_prompt_tokens, number) == mapped[0, first:].tolist()
        runs = geometry.freed_blocks(num_prompt_tokens, number)
        assert [block for run in runs for block in run] == event["freed"] and all(map(len, runs))
        assert geometry.num_freed(num_prompt_tokens, number) == len(event["freed"]) * geometry.block_size


@SIMULATIONS
@given(geometries(), st.integers(1, 40), st.data())
def test_a_resumed_request_sees_the_same_events_and_needs_no_more_blocks(geometry, num_prompt_tokens, data):
    num_tokens = data.draw(st.integers(num_prompt_tokens + 1, enough_tokens(geometry, num_prompt_tokens)))
    *_, first = decode(geometry, num_prompt_tokens, num_tokens)
    resumed = Simulation(geometry, num_prompt_tokens)
    token_budget = data.draw(st.integers(1, 50))  # the scheduler may give a step less than we allow
    while resumed.computed < num_tokens:
        allowed = geometry.max_chunk(num_prompt_tokens, resumed.computed)
        assert allowed >= 1
        resumed.step(min(allowed, token_budget, num_tokens - resumed.computed))
    assert resumed.cache == first.cache and resumed.table == first.table
    assert resumed.events == first.events
    assert resumed.peak <= first.peak == geometry.peak_blocks(num_prompt_tokens, num_tokens)


@SIMULATIONS
@given(geometries(), st.integers(1, 40))
def test_max_chunk_is_as_long_as_it_may_be(geometry, num_prompt_tokens):
    """One token more would run past an event or need a block more than decoding does."""
    computed = 0
    for _ in range(12):
        chunk = geometry.max_chunk(num_prompt_tokens, computed)
        events = geometry.num_events(num_prompt_tokens, computed)
        next_event = geometry.event_at(num_prompt_tokens, events)
        at_event = events > 0 and computed == geometry.event_at(num_prompt_tokens, events - 1)
        assert chunk >= 1 and computed + chunk <= next_event
        assert computed + chunk == next_event or (at_event and (computed + chunk) % geometry.block_size == 0)
        computed += chunk


@ARITHMETIC
@given(geometries(), st.integers(1, 10_000), st.integers(0, 50_000))
def test_sizes_and_monotone_growth(geometry, num_prompt_tokens, num_computed):
    protected = geometry.protected_len(num_prompt_tokens)
    assert 0 <= protected - num_prompt_tokens < geometry.block_size and protected % geometry.block_size == 0
    now, after = (geometry.num_events(num_prompt_tokens, n) for n in (num_computed, num_computed + 1))
    assert after - now == (num_computed + 1 == geometry.event_at(num_prompt_tokens, now))
    held = geometry.physical_len(num_prompt_tokens, num_computed)
    raw = held - geometry.candidate_start(num_prompt_tokens, now)
    assert raw < geometry.shape(now).num_candidates + geometry.buffer_size  # nothing due is left
    if now and geometry.policy == "window":
        assert raw >= geometry.buffer_size  # the newest tokens are never compressed
    front = protected
    if now and (cut := geometry.prompt_shape(num_prompt_tokens)):
        assert cut == (protected, geometry.prompt_budget) and geometry.prompt_budget < protected
        front = geometry.prompt_budget
    if now and geometry.policy == "budget":
        assert raw >= geometry.num_kept + geometry.buffer_size
        assert held < front + geometry.num_candidates + geometry.buffer_size  # bounded for ever
    if geometry.history_limit:
        assert held < front + geometry.history_limit + geometry.num_candidates + geometry.buffer_size
    shape = geometry.shape(now)
    assert (
        0 < shape.num_kept < shape.num_candidates
        and geometry.num_freed(num_prompt_tokens, now) % geometry.block_size == 0
    )
    assert shape in [geometry.shape(event) for event in geometry.first_of_each_shape]


@ARITHMETIC
@given(geometries(), st.integers(1, 300), st.integers(0, 200))
def test_max_tokens_that_fit_is_the_inverse_of_peak_blocks(geometry, num_prompt_tokens, num_blocks):
    most = geometry.max_tokens_that_fit(num_prompt_tokens, num_blocks)
    if most == 0:
        assert geometry.peak_blocks(num_prompt_tokens, num_prompt_tokens + 1) > num_blocks
        return
    assert geometry.peak_blocks(num_prompt_tokens, most) <= num_blocks
    if most >= 1 << 39:  # any length fits
        assert geometry.policy == "budget" or geometry.history_limit
        assert geometry.peak_blocks(num_prompt_tokens, 1 << 50) <= num_blocks
    else:
        assert geometry.peak_blocks(num_prompt_tokens, most + 1) > num_blocks


@given(st.integers(1, 100), st.integers(0, 8))
def test_block_map_of_a_batch_is_the_rows_of_each(num_prompt_tokens, events):
    geometry = Geometry(16, "window", 64, 32, 64, 20, 96, 32)
    batch = geometry.block_map(np.array([num_prompt_tokens, 5]), np.array([events, 2]), 12)
    for row, (prompt, count) in enumerate(((num_prompt_tokens, events), (5, 2))):
        np.testing.assert_array_equal(batch[row], geometry.block_map(np.array([prompt]), np.array([count]), 12)[0])


@ARITHMETIC
@given(geometries(), st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2000)), min_size=1, max_size=4))
def test_sizes_of_a_batch_are_those_of_each(geometry, requests):
    prompt, computed = np.array(requests).T
    events = geometry.num_events(prompt, computed)
    assert events.tolist() == [geometry.num_events(*request) for request in requests]
    for size in (geometry.num_removed, geometry.event_at, geometry.num_freed):
        assert size(prompt, events).tolist() == [size(p, geometry.num_events(p, c)) for p, c in requests]


def test_the_designs_formulas():
    """num_compressed_windows and physical_len as docs/design.md, section 2, states them."""
    geometry = Geometry.from_config(KvConfig(method="recent", buffer_size=64), block_size=16)
    assert geometry is not None and (geometry.num_kept, geometry.num_freed(500, 0)) == (80, 176)
    for prompt in (1, 15, 16, 17, 500):
        for computed in range(prompt, prompt + 1500):
            windows = max(0, (computed - ceil_div(prompt, 16) * 16 - 64) // 256)
            assert geometry.num_events(prompt, computed) == windows
            assert geometry.physical_len(prompt, computed) == computed - windows * (256 - 80)


def test_geometry_of_the_budget_policy():
    config = KvConfig(method="recent", policy="budget", budget_size=512, budget_interval=128)
    assert Geometry.from_config(config, block_size=32) == Geometry(32, "budget", 640, 512, 128, 128)


@ARITHMETIC
@given(st.integers(80, 10_000), st.integers(1, 1000), st.integers(1, 100_000))
def test_a_history_limit_changes_nothing_before_it_is_reached(history_size, num_prompt_tokens, num_tokens):
    free, limited = (
        Geometry.from_config(KvConfig(method="recent", history_size=size), block_size=16) for size in (0, history_size)
    )
    assert free is not None and limited is not None and history_size - 80 < limited.history_limit <= history_size
    total = num_prompt_tokens + num_tokens
    ours, theirs = (g.peak_blocks(num_prompt_tokens, total) for g in (limited, free))
    assert ours <= theirs
    if free.num_events(num_prompt_tokens, total) * free.num_kept <= history_size:
        assert ours == theirs
        assert limited.physical_len(num_prompt_tokens, total) == free.physical_len(num_prompt_tokens, total)


def test_an_answer_of_32k_tokens_fits_in_a_few_hundred_blocks():
    """Prompt, limit, a window and the buffer, and never more: 256 + 2,000 + 256 + 128 tokens in blocks of 16."""
    free, limited = (
        Geometry.from_config(KvConfig(method="recent", history_size=size), block_size=16) for size in (0, 2048)
    )
    assert free is not None and limited is not None
    # 25 windows leave 80 survivors each; as many as of 18 windows outlive the compression of the history.
    assert (limited.history_limit, limited.history_kept, limited.cycle) == (2000, 1440, 8)
    assert limited.peak_blocks(256, 256 + 32768) == (256 + 2000 + 256 + 128) // 16 == 165
    assert free.peak_blocks(256, 256 + 32768) == 670 and ceil_div(256 + 32768, 16) == 2064


def test_a_prompt_budget_changes_nothing_for_shorter_prompts_nor_before_event_0():
    free, cut = (
        Geometry.from_config(KvConfig(method="recent", prompt_budget=size), block_size=16) for size in (0, 128)
    )
    assert free is not None and cut is not None and free.prompt_shape(5000) is None
    assert cut.prompt_shape(113) is cut.prompt_shape(128) is None and cut.prompt_shape(129) == (144, 128)
    assert cut.physical_len(100, 5000) == free.physical_len(100, 5000)
    due = cut.event_at(1000, 0)
    assert cut.physical_len(1000, due - 1) == due - 1 and cut.peak_blocks(1000, due - 1) == free.peak_blocks(
        1000, due - 1
    )
    assert cut.physical_len(1000, due) == free.physical_len(1000, due) - (1008 - 128)
    # The whole prompt and the first window stay the peak for long: 8 blocks of the prompt's 63, and 5 a window.
    assert cut.peak_blocks(1000, due + 1) == cut.peak_blocks(1000, due + 256 * 11) == due // 16 == 87
    assert [len(run) for run in cut.freed_blocks(1000, 0)] == [63 - 8, 16 - 5]


@pytest.mark.parametrize(
    "history_size, ratio, limit, kept",
    [(80, 0.3, 80, 80), (200, 0.3, 160, 80), (1000, 0.3, 960, 720), (1000, 0.9, 896, 672), (0, 0.3, 0, 0)],
)
def test_history_is_whole_groups(history_size, ratio, limit, kept):
    config = KvConfig(method="recent", retention_ratio=ratio, history_size=history_size)
    geometry = Geometry.from_config(config, block_size=16)
    assert geometry is not None and (geometry.history_limit, geometry.history_kept) == (limit, kept)
    assert geometry.shape(0) == (256, geometry.num_kept)
    if limit:
        assert geometry.shape(limit // geometry.num_kept) == (limit + 256, kept)


@pytest.mark.parametrize(
    "ratio, window, block, kept", [(0.3, 256, 16, 80), (0.3, 256, 128, 128), (0.5, 64, 32, 32), (0.1, 512, 16, 48)]
)
def test_num_kept_rounds_to_whole_blocks(ratio, window, block, kept):
    assert num_kept(ratio, window, block) == kept


@ARITHMETIC
@given(st.floats(0.01, 0.99), st.integers(2, 64), st.sampled_from([1, 16, 32]))
def test_a_window_size_that_comes_closer(ratio, blocks, block_size):
    try:
        kept = num_kept(ratio, blocks * block_size, block_size)
    except ValueError:
        return  # refused before anyone asks
    closer = fitting_window_size(ratio, blocks * block_size, block_size)
    share = num_kept(ratio, closer, block_size) / closer
    assert abs(share - ratio) <= 0.05 * ratio and not is_rounded(ratio, closer, num_kept(ratio, closer, block_size))
    if abs(kept / (blocks * block_size) - ratio) <= 0.05 * ratio:
        assert closer == blocks * block_size


@pytest.mark.parametrize(
    "ratio, window_size, kept, rounded, closer",
    [(0.3, 128, 32, True, 112), (0.3, 256, 80, False, 256), (0.2, 128, 32, True, 160), (0.1, 128, 16, True, 160)],
)
def test_rounded_ratios_by_hand(ratio, window_size, kept, rounded, closer):
    assert num_kept(ratio, window_size, 16) == kept
    assert is_rounded(ratio, window_size, kept) is rounded
    assert fitting_window_size(ratio, window_size, 16) == closer
