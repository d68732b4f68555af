"""What a method receives at each event, and how its result is applied, over a store of plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvllm.compression.compressor import Compressor, Fused, most_survivors
from kvllm.compression.query_ring import query_positions
from kvllm.compression.rows import Due
from kvllm.compression.store import ALL_LAYERS
from kvllm.config import KvConfig
from kvllm.layout import Geometry
from kvllm.methods.base import Kept, Method, Window
from kvllm.methods.rope import Rope, frequencies

BLOCK_SIZE, NUM_LAYERS, NUM_KV_HEADS, GROUP_SIZE = 4, 5, 2, 2
LAYER_NUMBERS = [0, 2, 3, 6, 7]  # of the model; the others are not compressed
ROW, LAYER, POSITION = range(3)  # what a key, a value and a query say of themselves
SIZES: dict[str, Any] = {"method": "recent", "window_size": 16, "buffer_size": 8, "query_stride": 4}


def geometry_of(config: KvConfig, ratio: float | None = None) -> Geometry:
    geometry = Geometry.from_config(config, BLOCK_SIZE, ratio)
    assert geometry is not None
    return geometry


class Span(NamedTuple):
    """Candidates: the request in `row`, `num_tokens` tokens from physical index `start` on, or its whole prompt."""

    row: int
    start: int
    num_tokens: int


class DenseStore:
    """Requests by row: keys of each layer, [num_tokens, num_kv_heads, 3], that say whose they are; values: negative."""

    num_layers, num_kv_heads = NUM_LAYERS, NUM_KV_HEADS

    def __init__(self, config: KvConfig, max_batch: int = 100) -> None:
        self.config, self.max_batch = config, max_batch
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.num_computed: dict[int, int] = {}

    def grow(self, row: int, num_tokens: int) -> None:
        first = self.num_computed.get(row, 0)
        labels = torch.zeros(NUM_LAYERS, num_tokens - first, NUM_KV_HEADS, 3)
        labels[..., ROW], labels[..., POSITION] = row, torch.arange(first, num_tokens)[None, :, None]
        labels[..., LAYER] = torch.arange(NUM_LAYERS)[:, None, None]
        for held, new in ((self.keys, labels), (self.values, -labels)):
            before = held.get(row, [torch.empty(0, NUM_KV_HEADS, 3)] * NUM_LAYERS)
            held[row] = [torch.cat(pair) for pair in zip(before, new, strict=True)]
        self.num_computed[row] = num_tokens

    def positions(self, row: int) -> Tensor:
        """[num_layers, num_kv_heads, num_tokens]: of what is in the cache."""
        return torch.stack([keys[..., POSITION].T for keys in self.keys[row]]).long()

    def candidates(self, due: Sequence[Due]) -> list[Span]:
        ((geometry, shape),) = {(each.geometry, each.geometry.shape(each.event)) for each in due}
        starts = [geometry.candidate_start(each.num_prompt_tokens, each.event) for each in due]
        return [Span(each.row, start, shape.num_candidates) for each, start in zip(due, starts, strict=True)]

    def prompt(self, due: Due) -> list[Span]:
        return [Span(due.row, 0, due.geometry.protected_len(due.num_prompt_tokens))]

    def part(self, candidates: list[Span], events: slice) -> list[Span]:
        return candidates[events]

    def queries(self, candidates: list[Span], layers: slice = ALL_LAYERS) -> Tensor:
        labels = torch.zeros(len(candidates), NUM_LAYERS, self.config.num_queries, NUM_KV_HEADS * GROUP_SIZE, 3)
        labels[..., LAYER] = torch.arange(NUM_LAYERS)[:, None, None]
        for label, span in zip(labels, candidates, strict=True):
            label[..., ROW] = span.row
            behind = self.config.query_stride * torch.arange(self.config.num_queries - 1, -1, -1)
            label[..., POSITION] = (self.num_computed[span.row] - 1 - behind)[:, None]
        return labels[:, layers].flatten(0, 1)

    def read(self, candidates: list[Span], layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        def of(held: dict[int, list[Tensor]]) -> Tensor:
            return torch.stack([x[p.start : p.start + p.num_tokens] for p in candidates for x in held[p.row][layers]])

        return of(self.keys), of(self.values)

    def write(self, candidates: list[Span], kept: Kept, layers: slice = ALL_LAYERS) -> None:
        """As in the reference: the rest of the request moves up to follow the survivors."""
        assert (kept.keys is None) == (kept.values is None)
        index = kept.indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 3)
        before = self.read(candidates, layers)
        for held, new, old in zip((self.keys, self.values), (kept.keys, kept.values), before, strict=True):
            rows = iter(old.gather(1, index) if new is None else new)
            for p in candidates:
                for i in range(NUM_LAYERS)[layers]:
                    x = held[p.row][i]
                    held[p.row][i] = torch.cat([x[: p.start], next(rows), x[p.start + p.num_tokens :]])


@dataclass(frozen=True)
class Checking(Method):
    """Keeps other tokens in every layer and head, and checks all that it is shown against the labels."""

    seen: list[Window] = field(default_factory=list)

    def score(self, window: Window) -> Tensor:
        self.seen.append(window)
        keys, queries = window.keys, window.queries
        positions = keys[..., POSITION].transpose(1, 2).long()  # [batch, num_kv_heads, num_tokens]
        assert torch.equal(window.positions, positions) and torch.equal(window.values, -keys)
        owners = keys[:, 0, 0, [ROW, LAYER]]
        assert (keys[..., [ROW, LAYER]] == owners[:, None, None]).all()
        assert (queries[..., [ROW, LAYER]] == owners[:, None, None]).all()
        assert window.layers.tolist() == [LAYER_NUMBERS[int(i)] for i in owners[:, 1]]
        # Seen from the newest candidate the text is dense, so its position says which tokens ask.
        standing = window.query_positions - (window.num_tokens - 1) + positions[:, :1, -1]
        if window.num_tokens - 1 == positions[0, 0, -1]:  # the first tokens of the text
            standing = window.query_positions.expand(len(keys), -1)
        assert torch.equal(queries[:, :, 0, POSITION].long(), standing)
        return ((positions * 7919 + 31 * window.layers[:, None, None]) * torch.tensor([[[1], [3]]]) % 101).float()


def compressor_of(
    config: KvConfig, store: DenseStore, method: Method | None = None, num_reqs: int = 8, **options: Any
) -> Compressor:
    most = most_survivors(config)
    positions = torch.full((num_reqs, NUM_LAYERS, NUM_KV_HEADS, most), -1, dtype=torch.int32) if most else None
    shifts = torch.arange(GROUP_SIZE) * config.query_stride // GROUP_SIZE
    return Compressor(
        config, method or Checking(), store, torch.tensor(LAYER_NUMBERS), shifts, None, positions, **options
    )


def due_at(store: DenseStore, geometry: Geometry, row: int, num_prompt_tokens: int, event: int) -> Due:
    """The event, and a request that has just reached it."""
    store.grow(row, geometry.event_at(num_prompt_tokens, event))
    return Due(0, row, geometry, num_prompt_tokens, event)


def windows_of(compressor: Compressor) -> list[tuple[int, int]]:
    """Batch size and token count of each window that the method received."""
    assert isinstance(compressor.method, Checking)
    return [(len(window.keys), window.num_tokens) for window in compressor.method.seen]


@pytest.mark.parametrize("name", ["window", "history", "prompt", "both", "budget"])
def test_positions_of_survivors_over_many_events(name: str) -> None:
    """`Checking` is shown the true positions in every event; what is left is what it chose, and nothing else moved."""
    every: dict[str, dict[str, Any]] = {
        "window": {"retention_ratio": 0.4},
        "history": {"retention_ratio": 0.4, "history_size": 20},
        "prompt": {"retention_ratio": 0.5, "prompt_budget": 8},
        "both": {"retention_ratio": 0.5, "prompt_budget": 8, "history_size": 16},
        "budget": {"policy": "budget", "budget_size": 16, "budget_interval": 8, "prompt_budget": 4},
    }
    options = every[name]
    config = KvConfig(**SIZES, **options)
    geometry, store = geometry_of(config), DenseStore(config)
    kept: list[tuple[Tensor, bool]] = []
    compressor = compressor_of(config, store, observe=lambda k, of_prompt: kept.append((k.indices, of_prompt)))
    prompts = {3: 11, 6: 30}  # other rows than indices in a batch; 32 tokens in the blocks of the second
    for event in range(9):
        due = [due_at(store, geometry, row, prompt, event) for row, prompt in prompts.items()]
        before = {row: store.positions(row) for row in prompts}
        kept.clear()
        compressor.compress(due)
        shape = geometry.shape(event)
        (indices, of_prompt), *of_prompts = kept
        assert not of_prompt and indices.shape == (2 * NUM_LAYERS, NUM_KV_HEADS, shape.num_kept)
        cut = [each for each in due if event == 0 and geometry.prompt_shape(each.num_prompt_tokens)]
        assert [flag for _, flag in of_prompts] == [True] * len(cut)
        for each, chosen in zip(due, indices.split(NUM_LAYERS), strict=True):
            start = geometry.candidate_start(each.num_prompt_tokens, event)
            old, end = before[each.row], start + shape.num_candidates
            front = old[..., :start]
            if each in cut:
                front = front.gather(-1, of_prompts[cut.index(each)][0])
            expected = torch.cat([front, old[..., start:end].gather(-1, chosen), old[..., end:]], dim=-1)
            assert torch.equal(store.positions(each.row), expected)
            length = geometry.event_at(each.num_prompt_tokens, event)
            assert expected.shape[-1] == geometry.physical_len(each.num_prompt_tokens, length)
            assert not torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[:, 0], chosen[:, 1])
            if compressor.positions is not None:
                first = geometry.prompt_len(each.num_prompt_tokens, event + 1)
                survivors = expected[..., first : first + geometry.survivors(event + 1)]
                assert torch.equal(compressor.positions[each.row, ..., : survivors.shape[-1]].long(), survivors)
    if compressor.positions is not None:
        assert bool((compressor.positions[[0, 1, 2, 4, 5, 7]] == -1).all())  # of other requests nothing


def test_events_of_one_geometry_and_shape_go_together() -> None:
    """By hand: 1.6 of 4 blocks stay, 2 of the first window, then 1, 2, 1; other ratios are other geometries."""
    config = KvConfig(**SIZES, retention_ratio=0.4, request_ratios="0.5")
    store, usual, half = DenseStore(config), geometry_of(config), geometry_of(config, 0.5)
    compressor = compressor_of(config, store)
    for row in (1, 3):  # these two have had their first
        compressor.compress([due_at(store, usual, row, 5, 0)])
    compressor.method.seen.clear()  # type: ignore[attr-defined]
    due = [
        due_at(store, usual, 0, 9, 0), due_at(store, usual, 1, 5, 1), due_at(store, half, 2, 7, 0),
        due_at(store, usual, 3, 5, 1), due_at(store, usual, 4, 30, 0),
    ]  # fmt: skip
    compressor.compress(due)
    rows = [w.keys[::NUM_LAYERS, 0, 0, ROW].tolist() for w in compressor.method.seen]  # type: ignore[attr-defined]
    assert rows == [[0, 4], [1, 3], [2]]
    held = [len(store.keys[row][0]) for row in range(5)]
    # What the blocks of the prompt hold, the survivors, and the buffer of 8.
    assert held == [12 + 8 + 8, 8 + 12 + 8, 8 + 8 + 8, 8 + 12 + 8, 32 + 8 + 8]


@pytest.mark.parametrize("max_batch, sizes", [(1, [1] * 5), (2, [2, 2, 1]), (100, [5])])
def test_parts_of_a_group(max_batch: int, sizes: list[int]) -> None:
    config = KvConfig(**SIZES, retention_ratio=0.5)
    store, geometry = DenseStore(config, max_batch), geometry_of(config)
    compressor = compressor_of(config, store)
    compressor.compress([due_at(store, geometry, row, 5 + row, 0) for row in range(5)])
    assert windows_of(compressor) == [(NUM_LAYERS * size, 16) for size in sizes]


def test_an_event_that_reads_the_history_counts_as_more_windows() -> None:
    """By hand: 16 survivors and a window of 16 are two windows, so of four windows at once two events."""
    config = KvConfig(**SIZES, retention_ratio=0.5, history_size=16)
    store, geometry = DenseStore(config, max_batch=4), geometry_of(config)
    compressor = compressor_of(config, store)
    assert geometry.shape(2) == (16, 16, 12)
    for event in range(3):
        compressor.compress([due_at(store, geometry, row, 5, event) for row in range(4)])
    assert windows_of(compressor) == [(4 * NUM_LAYERS, 16)] * 2 + [(2 * NUM_LAYERS, 32)] * 2


def test_an_event_that_keeps_everything_asks_no_method() -> None:
    """By hand: 3.8 of 4 blocks stay, so 4, 4, 3, and the fourth event reads 11 blocks and its window.

    Nothing is moved, but survivors have positions, which that later event needs.
    """
    config = KvConfig(**SIZES, retention_ratio=0.95, history_size=44)
    store, geometry = DenseStore(config), geometry_of(config)
    assert [geometry.shape(event) for event in range(4)] == [(0, 16, 16), (0, 16, 16), (0, 16, 12), (44, 16, 32)]
    kept: list[Tensor] = []
    compressor = compressor_of(config, store, observe=lambda k, of_prompt: kept.append(k.indices))
    for event in range(2):
        due = due_at(store, geometry, 0, 5, event)
        before = store.keys[0]
        compressor.compress([due])
        assert store.keys[0] is before and windows_of(compressor) == []
        assert torch.equal(kept[-1], torch.arange(16).expand(NUM_LAYERS, NUM_KV_HEADS, -1))
    for event in (2, 3):
        compressor.compress([due_at(store, geometry, 0, 5, event)])
    assert windows_of(compressor) == [(NUM_LAYERS, 16), (NUM_LAYERS, 60)]


@pytest.mark.parametrize("max_batch, layers", [(1, [2, 2, 1]), (2, [4, 1]), (3, [5])])
def test_a_prompt_is_cut_some_layers_at_a_time(max_batch: int, layers: list[int]) -> None:
    """By hand: a prompt of 40 is 2.5 windows, so 5 layers of one window are 2 layers of the prompt."""
    config = KvConfig(**SIZES, retention_ratio=0.5, prompt_budget=8)
    store, geometry = DenseStore(config, max_batch), geometry_of(config)
    seen: list[tuple[tuple[int, ...], bool]] = []
    compressor = compressor_of(config, store, observe=lambda k, of_prompt: seen.append((k.indices.shape, of_prompt)))
    due = due_at(store, geometry, 2, 39, 0)
    expected_queries = 40 + query_positions(config, geometry, 0)
    compressor.compress([due])
    assert windows_of(compressor) == [(NUM_LAYERS, 16), *((count, 40) for count in layers)]
    last = compressor.method.seen[-1]  # type: ignore[attr-defined]
    assert last.query_positions.tolist() == expected_queries.tolist() and last.layers.tolist()[-1] == 7
    assert seen == [((5, 2, 8), False), ((5, 2, 8), True)]
    positions = store.positions(2)
    assert positions.shape[-1] == 8 + 8 + 8 and bool((positions[..., :8] < 40).all())
    assert bool((positions.diff() > 0).all())


def test_a_second_event_leaves_the_prompt_alone() -> None:
    config = KvConfig(**SIZES, retention_ratio=0.5, prompt_budget=8)
    store, geometry = DenseStore(config), geometry_of(config)
    compressor = compressor_of(config, store)
    for event in (0, 1):
        compressor.compress([due_at(store, geometry, 0, 39, event)])
    assert [tokens for _, tokens in windows_of(compressor)] == [16, 40, 16]


def fused_into(calls: list[tuple[list[Span], int]]) -> Fused:
    return lambda candidates, num_kept: calls.append((candidates, num_kept))


def test_fused_kernels_do_a_windows_work_where_there_are_any() -> None:
    """All of a batch in one call, whatever `max_batch` is. Prompts are still the method's: four layers, then one."""
    config = KvConfig(**SIZES, retention_ratio=0.7, prompt_budget=8)
    store, geometry = DenseStore(config, max_batch=1), geometry_of(config)
    assert [geometry.shape(event).num_kept for event in range(3)] == [12, 12, 8]
    calls: list[tuple[list[Span], int]] = []
    observed: list[bool] = []
    compressor = compressor_of(
        config, store, fused=fused_into(calls), observe=lambda kept, of_prompt: observed.append(of_prompt)
    )
    due = [due_at(store, geometry, row, prompt, 0) for row, prompt in ((4, 5), (1, 20))]
    compressor.compress(due)
    assert calls == [([Span(4, 8, 16), Span(1, 20, 16)], 12)]
    assert [tokens for _, tokens in windows_of(compressor)] == [20] * 2 and observed == [True]

    everything = geometry_of(replace(config, retention_ratio=0.95))
    compressor.compress([due_at(store, everything, 6, 5, 0)])
    assert len(calls) == 1

    compressor.fused = None
    compressor.compress([due_at(store, geometry, 5, 5, 0)])
    assert len(calls) == 1 and windows_of(compressor)[-1] == (NUM_LAYERS, 16) and observed == [True, False]


@dataclass(frozen=True)
class Changing(Checking):
    """New keys, new values, or both: ten more than the kept tokens' own."""

    changes: str = "keys"

    def compress(self, window: Window, num_kept: int) -> Kept:
        kept = super().compress(window, num_kept)
        index = kept.indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 3)
        keys, values = (x.gather(1, index) + 10 for x in (window.keys, window.values))
        return Kept(
            kept.indices, *(x if name in self.changes else None for name, x in (("keys", keys), ("values", values)))
        )


@pytest.mark.parametrize("changes", ["keys", "values", "keys and values"])
def test_new_keys_or_values_are_written_with_the_others_own(changes: str) -> None:
    config = KvConfig(**SIZES, retention_ratio=0.5)
    store, geometry = DenseStore(config), geometry_of(config)
    chosen: list[Tensor] = []
    compressor = compressor_of(config, store, Changing(changes=changes), observe=lambda k, _: chosen.append(k.indices))
    compressor.compress([due_at(store, geometry, 0, 8, 0)])
    positions = (8 + chosen[0]).transpose(1, 2)  # behind a prompt of two blocks
    for name, held, sign in (("keys", store.keys, 1), ("values", store.values, -1)):
        written = torch.stack(held[0])[:, 8:16, :, POSITION]
        assert torch.equal(written, sign * positions + 10.0 * (name in changes))


@dataclass(frozen=True)
class Rotating(Checking):
    """A method that needs the model's rotary embedding, and supports only some of them."""

    @property
    def uses_rope(self) -> bool:
        return True

    def check_rope(self, rope: Rope | None) -> None:
        if rope is None:
            raise ValueError("no rotary embedding")


def test_a_method_that_the_rotary_embedding_does_not_suit_is_refused_at_start() -> None:
    config = KvConfig(**SIZES)
    with pytest.raises(ValueError, match="no rotary embedding"):
        compressor_of(config, DenseStore(config), Rotating())


def test_each_layer_comes_with_its_own_rotary_embedding() -> None:
    config = KvConfig(**SIZES, retention_ratio=0.5, prompt_budget=8)
    store, geometry = DenseStore(config, max_batch=2), geometry_of(config)
    table = torch.stack([frequencies(10_000.0 + i, 4) for i in range(NUM_LAYERS)])
    shifts = torch.arange(GROUP_SIZE) * config.query_stride // GROUP_SIZE
    method = Rotating()
    compressor = Compressor(config, method, store, torch.tensor(LAYER_NUMBERS), shifts, Rope(table))
    compressor.compress([due_at(store, geometry, row, 39, 0) for row in (0, 1)])
    assert len(method.seen) == 1 + 2 * 2  # both windows at once, and each prompt in two parts
    for window in method.seen:
        assert window.rope is not None
        assert torch.equal(window.rope.frequencies, table[window.keys[:, 0, 0, LAYER].long()])


def test_most_survivors_bounds_every_geometry() -> None:
    options: list[dict[str, Any]] = [
        {"history_size": 44, "retention_ratio": 0.95}, {"history_size": 16, "retention_ratio": 0.3},
        {"policy": "budget", "budget_size": 16, "budget_interval": 8},
    ]  # fmt: skip
    for each in options:
        config = KvConfig(**SIZES, **each)
        assert geometry_of(config).most_survivors <= most_survivors(config)
    assert most_survivors(KvConfig(**SIZES)) == 0
