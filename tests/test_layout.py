"""The closed forms of `layout` against a request simulated step by step, and against numbers worked out by
hand.

Where the blocks lie is in tests/compression/test_blocks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.layout import NEVER, Geometry, GroupedGeometry, Shape, ceil_div, request_geometry

SIMULATIONS = settings(max_examples=60, deadline=None)
ARITHMETIC = settings(max_examples=200, deadline=None)


def geometry_of(block_size: int = 16, packed_tokens: int | None = None, **options: Any) -> Geometry:
    config = KvConfig(method="recent", **options)
    geometry = Geometry.from_config(config, block_size, packed_tokens=packed_tokens)
    assert geometry is not None
    return geometry


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    block = draw(st.sampled_from([1, 2, 4, 16]))
    buffer = draw(st.integers(1, 3 * block + 1))
    prompt = draw(st.integers(0, 3)) * block
    options: dict[str, Any] = {"query_stride": 1, "prompt_budget": prompt, "buffer_size": buffer}
    if draw(st.booleans()):
        return draw(packed_geometries(block, buffer))
    if draw(st.booleans()):
        blocks = draw(st.integers(2, 6))
        ratio = draw(st.floats(1 / blocks, 0.99).map(lambda r: max(r, 1 / blocks)))
        limit = draw(st.sampled_from([0, 0, 2 * blocks * block, 5 * blocks * block]))
        options |= {"window_size": blocks * block, "retention_ratio": ratio, "history_size": limit}
    else:
        kept, interval = draw(st.integers(1, 5)), draw(st.integers(1, 4))
        options |= {"policy": "budget", "window_size": 1}
        options |= {"budget_size": kept * block, "budget_interval": interval * block}
    return geometry_of(block, **options)


@st.composite
def packed_geometries(draw: st.DrawFn, block: int, buffer: int) -> Geometry:
    held = draw(st.integers(block + 1, 5 * block))
    window = ceil_div(held * draw(st.integers(1, 5)), block) * block
    most = window // held
    blocks = draw(st.floats(1, most)) if most > 1 else 1.0
    ratio = min(max(blocks * held / window, held / window + 1e-4), most * held / window - 1e-4, 0.99)
    options: dict[str, Any] = {"query_stride": 1, "buffer_size": buffer, "window_size": max(window, 2 * block)}
    try:
        return geometry_of(block, held, retention_ratio=ratio, **options)
    except UsageError:  # a single block that fills the window to within the rounding of a ratio
        reject()
        raise


@dataclass
class Simulation:
    """One request: what its events read and leave, with nothing computed ahead.

    cache: an entry for each cached token: its position, or "survivor", or "prompt" for one of a prompt that was cut
    """

    geometry: Geometry
    num_prompt_tokens: int
    cache: list[int | str] = field(default_factory=list)
    computed: int = 0
    events: list[tuple[int, Shape]] = field(default_factory=list)
    peak: int = 0
    exact: Fraction = Fraction(0)  # tokens that the windows since the last cut of the history should have kept

    def compress_if_due(self) -> None:
        g, budget = self.geometry, self.geometry.kept_blocks == 0
        survivors = self.cache.count("survivor")
        raw = g.interval + (g.first_extra if not self.events else 0)
        whole = ceil_div(self.num_prompt_tokens, g.block_size) * g.block_size
        prompt = min(whole, g.prompt_budget) if self.events and g.prompt_budget else whole
        if len(self.cache) < prompt + survivors + raw + g.buffer_size:
            return
        exact = self.exact + g.kept_blocks
        kept = (int(exact + Fraction(1, 2)) - int(self.exact + Fraction(1, 2))) * g.block_size
        history, start = 0, prompt + survivors
        if budget or (g.tracks_survivors and len(self.events) >= g.first_cut and self.passes_limit(kept)):
            history, start, kept, exact = survivors, prompt, g.history_kept, Fraction(0)
        self.exact = exact
        self.events.append(
            (self.computed, Shape(history, raw, kept // g.block_size * (g.packed_tokens or g.block_size)))
        )
        self.cache[start : start + history + raw] = ["survivor"] * kept
        if len(self.events) == 1 and 0 < g.prompt_budget < whole:
            self.cache[:whole] = ["prompt"] * g.prompt_budget

    def passes_limit(self, kept: int) -> bool:
        """Whether another window's survivors would exceed the history's size at its first cut, or a whole cycle."""
        cuts = [i for i, (_, shape) in enumerate(self.events) if shape.num_history]
        return not cuts or len(self.events) - cuts[-1] == self.geometry.cycle

    def step(self, num_new: int) -> None:
        self.compress_if_due()
        self.cache += range(self.computed, self.computed + num_new)
        self.computed += num_new
        self.peak = max(self.peak, len(self.cache))


def decode(geometry: Geometry, num_prompt_tokens: int, num_tokens: int):  # type: ignore[no-untyped-def]
    """Yield the simulation after its prefill, then after each decode step."""
    simulation = Simulation(geometry, num_prompt_tokens)
    simulation.step(num_prompt_tokens)
    yield simulation
    for _ in range(num_tokens - num_prompt_tokens):
        simulation.step(1)
        yield simulation


def enough_tokens(geometry: Geometry, num_prompt_tokens: int) -> int:
    """A length with at least three events behind it (with a limit on survivors: two cuts) and some more."""
    last = geometry.first_cut + geometry.cycle if geometry.tracks_survivors else 0
    return geometry.event_at(num_prompt_tokens, max(last, 2)) + geometry.block_size + 2


@SIMULATIONS
@given(geometries(), st.integers(1, 40))
def test_layout_equals_the_simulation(geometry: Geometry, num_prompt_tokens: int) -> None:
    for sim in decode(geometry, num_prompt_tokens, enough_tokens(geometry, num_prompt_tokens)):
        begun_at = sim.computed - 1  # tokens computed when the last step began
        events = geometry.num_events(num_prompt_tokens, begun_at)
        assert events == len(sim.events)
        assert geometry.survivors(events) == sim.cache.count("survivor")
        raw = [entry for entry in sim.cache if isinstance(entry, int)]
        if events:
            front = 0 if "prompt" in sim.cache else geometry.protected_len(num_prompt_tokens)
            assert raw[front] == geometry.tail_start(num_prompt_tokens, events)
            assert len(sim.cache) - len(raw[front:]) == geometry.prefix_len(num_prompt_tokens, events)
        assert geometry.physical_len(num_prompt_tokens, begun_at) == len(sim.cache) - 1
        if sim.computed > num_prompt_tokens:
            assert geometry.peak_tokens(num_prompt_tokens, sim.computed) == sim.peak
    assert len(sim.events) >= 3
    for number, (at, shape) in enumerate(sim.events):
        assert geometry.event_at(num_prompt_tokens, number) == at
        assert geometry.shape(number) == shape and 0 < shape.num_kept <= shape.num_candidates
        assert all(size % geometry.block_size == 0 for size in shape[:2])
        space = geometry.num_kept_blocks(number) * geometry.block_size
        assert shape.num_kept * geometry.block_size == space * (geometry.packed_tokens or geometry.block_size)
        assert shape in geometry.shapes() and shape.num_history <= geometry.most_survivors or not shape.num_history
        cut = geometry.prompt_shape(num_prompt_tokens)
        freed = shape.num_candidates - space
        freed += cut.num_raw - cut.num_kept if cut and number == 0 else 0
        assert geometry.num_freed(num_prompt_tokens, number) == freed


@SIMULATIONS
@given(geometries(), st.integers(1, 40), st.data())
def test_a_resumed_request_sees_the_same_events_and_holds_no_more(
    geometry: Geometry, num_prompt_tokens: int, data: st.DataObject
) -> None:
    num_tokens = data.draw(st.integers(num_prompt_tokens + 1, enough_tokens(geometry, num_prompt_tokens)))
    *_, first = decode(geometry, num_prompt_tokens, num_tokens)
    resumed = Simulation(geometry, num_prompt_tokens)
    token_budget = data.draw(st.integers(1, 50))  # the scheduler may give a step less than we allow
    while resumed.computed < num_tokens:
        allowed = geometry.max_chunk(num_prompt_tokens, resumed.computed)
        assert allowed >= 1
        resumed.step(min(allowed, token_budget, num_tokens - resumed.computed))
    assert resumed.cache == first.cache and resumed.events == first.events
    assert resumed.peak <= first.peak == geometry.peak_tokens(num_prompt_tokens, num_tokens)


@SIMULATIONS
@given(geometries(), st.integers(1, 40))
def test_max_chunk_ends_at_the_next_event(geometry: Geometry, num_prompt_tokens: int) -> None:
    computed = 0
    for event in range(5):
        computed += geometry.max_chunk(num_prompt_tokens, computed)
        assert computed == geometry.event_at(num_prompt_tokens, event)


@ARITHMETIC
@given(geometries(), st.integers(1, 300), st.integers(0, 200))
def test_max_tokens_that_fit_is_the_inverse_of_peak_blocks(
    geometry: Geometry, num_prompt_tokens: int, num_blocks: int
) -> None:
    most = geometry.max_tokens_that_fit(num_prompt_tokens, num_blocks)
    if most == 0:
        assert geometry.peak_blocks(num_prompt_tokens, num_prompt_tokens + 1) > num_blocks
        return
    assert geometry.peak_blocks(num_prompt_tokens, most) <= num_blocks
    if most >= 1 << 39:  # any length fits
        assert geometry.tracks_survivors
        assert geometry.peak_blocks(num_prompt_tokens, 1 << 50) <= num_blocks
    else:
        assert geometry.peak_blocks(num_prompt_tokens, most + 1) > num_blocks


@ARITHMETIC
@given(geometries(), st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2000)), min_size=1, max_size=4))
def test_sizes_of_a_batch_are_those_of_each(geometry: Geometry, requests: list[tuple[int, int]]) -> None:
    prompt, computed = np.array(requests).T
    events = geometry.num_events(prompt, computed)
    assert events.tolist() == [geometry.num_events(*request) for request in requests]
    sizes = (geometry.num_removed, geometry.event_at, geometry.num_freed, geometry.prefix_len, geometry.tail_start)
    for size in sizes:
        assert size(prompt, events).tolist() == [size(p, geometry.num_events(p, c)) for p, c in requests]


@ARITHMETIC
@given(st.sampled_from([16, 32]), st.sampled_from([64, 128, 256, 512]), st.data())
def test_ratios_are_exact_on_average(block_size: int, window_size: int, data: st.DataObject) -> None:
    ratio = data.draw(st.floats(block_size / window_size, 0.95))
    geometry = geometry_of(block_size, window_size=window_size, retention_ratio=ratio)
    kept = np.diff(geometry.survivors(np.arange(65)))
    assert abs(kept.mean() / window_size - ratio) < 0.005
    assert kept.min() >= block_size and kept.max() - kept.min() <= block_size and not (kept % block_size).any()
    # At no time further from the exact share than half a block, but for the 1/10,000 that a ratio is rounded to.
    exact = ratio * window_size * np.arange(1, 65)
    assert (abs(kept.cumsum() - exact) <= block_size / 2 + 64 * window_size * 1e-4).all()


def test_ratios_by_hand() -> None:
    kept = {ratio: np.diff(geometry_of(retention_ratio=ratio).survivors(np.arange(6))) for ratio in (0.3, 0.0625, 0.97)}
    assert (kept[0.3] // 16).tolist() == [5, 5, 4, 5, 5]  # 4.8 blocks of 16
    assert (kept[0.0625] // 16).tolist() == [1, 1, 1, 1, 1]
    assert (kept[0.97] // 16).tolist() == [16, 15, 16, 15, 16]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"retention_ratio": 0.05}, r"retention_ratio=0.05: .* 16 tokens, .* 0.0625 of window_size=256.* at least 320"),
        ({"retention_ratio": 0.001}, r"window_size of at least 16000"),
        ({"window_size": 16}, r"window_size=16: .*use at least 64"),
        ({"window_size": 264}, r"window_size=264: must be a multiple of the KV block size, 16 tokens; use 272"),
        ({"prompt_budget": 100}, r"prompt_budget=100: .*use 112"),
        ({"history_size": 64}, r"history_size=64: one window alone leaves 80 survivors"),
        ({"policy": "budget", "budget_size": 808}, r"budget_size=808: must be a multiple"),
        ({"policy": "budget", "budget_size": 64, "budget_interval": 32}, r"window_size=256: .*use at most 96"),
    ],
)
def test_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometry_of(16, **options)


def test_a_refused_ratio_is_accepted_with_the_window_size_that_the_message_names() -> None:
    assert geometry_of(retention_ratio=0.05, window_size=320).shape(0).num_kept == 16
    assert geometry_of(retention_ratio=0.001, window_size=16000).shape(0).num_kept == 16


def test_the_designs_formulas() -> None:
    """num_events and physical_len as docs/design.md, section 3, states them."""
    geometry = geometry_of(buffer_size=64)
    assert geometry.shape(0) == (0, 256, 80) and geometry.num_freed(500, 0) == 176
    for prompt in (1, 15, 16, 17, 500):
        protected = ceil_div(prompt, 16) * 16
        for computed in range(prompt, prompt + 1500):
            events = max(0, (computed - protected - 64) // 256)
            assert geometry.num_events(prompt, computed) == events
            survivors = 16 * int(events * 0.3 * 256 / 16 + 0.5)
            assert geometry.prefix_len(prompt, events) == protected + survivors
            assert geometry.tail_start(prompt, events) == protected + events * 256
            assert geometry.physical_len(prompt, computed) == computed - events * 256 + survivors


def test_geometry_of_the_budget_policy() -> None:
    geometry = geometry_of(32, policy="budget", budget_size=512, budget_interval=128)
    assert geometry.shapes() == {(0, 640, 512): 0, (512, 128, 512): 1}
    assert [geometry.survivors(events) for events in range(4)] == [0, 512, 512, 512]
    assert geometry.event_at(100, 0) == 128 + 640 + 128 and geometry.event_at(100, 2) == 128 + 640 + 2 * 128 + 128
    # The prompt, the budget, an interval and the buffer, and never more.
    assert geometry.peak_tokens(100, 10**6) == 128 + 512 + 128 + 128


def test_a_limited_history_by_hand() -> None:
    geometry = geometry_of(history_size=512, retention_ratio=0.3)
    # 32 blocks, of which 24 stay; windows leave 4.8 blocks each.
    assert (geometry.first_cut, geometry.cycle, geometry.history_kept) == (6, 2, 384)
    assert [geometry.survivors(events) // 16 for events in range(11)] == [0, 5, 10, 14, 19, 24, 29, 24, 29, 24, 29]
    assert geometry.shape(6) == (464, 256, 384) and geometry.shape(7) == (0, 256, 80)
    assert geometry.most_survivors == 464 and geometry_of().most_survivors == 0


@ARITHMETIC
@given(st.integers(80, 10_000), st.integers(1, 1000), st.integers(1, 100_000))
def test_a_limited_history_changes_nothing_before_the_limit(
    history_size: int, num_prompt_tokens: int, num_tokens: int
) -> None:
    free, limited = geometry_of(), geometry_of(history_size=history_size)
    assert free.first_cut == NEVER and limited.most_survivors <= history_size
    total = num_prompt_tokens + num_tokens
    ours, theirs = (g.peak_blocks(num_prompt_tokens, total) for g in (limited, free))
    assert ours <= theirs
    if free.num_events(num_prompt_tokens, total) <= limited.first_cut:
        assert ours == theirs
        assert limited.physical_len(num_prompt_tokens, total) == free.physical_len(num_prompt_tokens, total)
        assert free.survivors(limited.first_cut) <= history_size < free.survivors(limited.first_cut + 1)


def test_an_answer_of_32k_tokens_fits_in_a_few_hundred_blocks() -> None:
    """The prompt, the limit, a window and the buffer, and never more."""
    free, limited = geometry_of(), geometry_of(history_size=2048)
    assert (limited.first_cut, limited.cycle, limited.history_kept) == (26, 7, 1536)
    assert limited.peak_blocks(256, 256 + 32768) == (256 + 2000 + 256 + 128) // 16 == 165
    assert free.peak_blocks(256, 256 + 32768) == 645 and ceil_div(256 + 32768, 16) == 2064


def test_a_prompt_budget_changes_nothing_for_shorter_prompts_nor_before_event_0() -> None:
    free, cut = geometry_of(), geometry_of(prompt_budget=128)
    assert free.prompt_shape(5000) is None
    assert cut.prompt_shape(113) is cut.prompt_shape(128) is None and cut.prompt_shape(129) == (0, 144, 128)
    assert cut.physical_len(100, 5000) == free.physical_len(100, 5000)
    due = cut.event_at(1000, 0)
    assert cut.physical_len(1000, due - 1) == due - 1
    assert cut.peak_blocks(1000, due - 1) == free.peak_blocks(1000, due - 1)
    assert cut.physical_len(1000, due) == free.physical_len(1000, due) - (1008 - 128)
    # The whole prompt and the first window stay the peak for long: 8 blocks of the prompt's 63, and 5 a window.
    assert cut.peak_blocks(1000, due + 1) == cut.peak_blocks(1000, due + 256 * 11) == due // 16 == 87
    assert cut.num_freed(1000, 0) == 16 * (63 - 8 + 16 - 5)


def test_packed_blocks() -> None:
    """Windows of 256 tokens, and blocks of 16 that hold 56 packed survivors each."""
    geometry = geometry_of(packed_tokens=56, retention_ratio=0.4375)
    assert geometry.shape(0) == geometry.shape(9) == Shape(0, 256, 112)
    # A prompt of 160 tokens, ten windows in 20 blocks, one raw window less a token, and the buffer.
    at = geometry.event_at(160, 9)
    assert geometry.physical_len(160, at) == 160 + 20 * 16 + 128
    assert geometry.peak_blocks(160, at + 255) == ceil_div(160 + 20 * 16 + 128 + 255, 16)
    # One and a half blocks on average.
    uneven = geometry_of(packed_tokens=56, retention_ratio=1.5 * 56 / 256)
    kept = [uneven.shape(event).num_kept for event in range(64)]
    assert set(kept) == {56, 112} and sum(kept) / (64 * 256) == pytest.approx(1.5 * 56 / 256, rel=5e-3)


@pytest.mark.parametrize(
    "ratio, message",
    [
        (0.9, "packed blocks hold 56 tokens each, so window_size=256 fills at most 4 of them. Use at most 0.875"),
        (0.2, "every window keeps at least one block of 56 tokens, which is 0.219 of window_size=256"),
    ],
)
def test_ratios_that_packed_blocks_cannot_keep(ratio: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        geometry_of(packed_tokens=56, retention_ratio=ratio)


def test_groups_of_layers_hold_together_what_each_of_them_holds() -> None:
    config = KvConfig(retention_ratio={"0": 0.5, "1": 0.25, "2": 0.15}, window_size=128, buffer_size=32)
    geometry = request_geometry(config, 16)
    assert isinstance(geometry, GroupedGeometry) and len(geometry.groups) == 3
    assert [float(group.kept_blocks) for group in geometry.groups] == [4, 2, 1.2]
    for prompt, computed in ((1, 1), (40, 500), (40, 1000), (17, 1217)):
        events = geometry.num_events(prompt, computed)
        held = [-(-group.physical_len(prompt, computed) // 16) for group in geometry.groups]
        assert geometry.blocks_held(prompt, computed) == sum(held)
        assert {group.num_events(prompt, computed) for group in geometry.groups} == {events}
        before = geometry.event_at(prompt, events) - 1
        freed = geometry.blocks_held(prompt, before) - geometry.blocks_held(prompt, before + 1)
        assert geometry.blocks_freed(prompt, events) - 3 <= freed <= geometry.blocks_freed(prompt, events)
    # All that is ever held, step by step, is what the groups are admitted with, or a few blocks less.
    most = max(geometry.blocks_held(40, computed) for computed in range(1, 1200))
    assert most <= geometry.peak_blocks(40, 1200) <= most + 3
    longest = geometry.max_tokens_that_fit(40, most + 3)
    assert geometry.peak_blocks(40, longest) <= most + 3 < geometry.peak_blocks(40, longest + 1)
    assert abs(sum(geometry.num_evicted(40, event) for event in range(6)) - 6 * 128 * 0.7) < 8  # half a block


def test_a_table_of_equal_ratios_is_one_ratio() -> None:
    table = request_geometry(KvConfig(retention_ratio={"0": 0.3, "1": 0.3}), 16)
    plain = request_geometry(KvConfig(retention_ratio=0.3), 16)
    assert table is not None and plain is not None and table.groups == (*plain.groups, *plain.groups)
    assert table.peak_blocks(100, 3000) == 2 * plain.peak_blocks(100, 3000)
    assert request_geometry(KvConfig(retention_ratio={"0": 0.3, "1": 0.5}), 16, 1.0) is None


def test_the_refusal_of_a_table_names_the_layers() -> None:
    with pytest.raises(UsageError, match=r"^layers 2-3: retention_ratio=0.05: every window keeps at least one block"):
        request_geometry(KvConfig(retention_ratio={"0-1": 0.3, "2-3": 0.05}), 16)
