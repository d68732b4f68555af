"""Locations of the candidates in a paged cache at each event, against a list of each request's blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvllm.compression.blocks import close_gap
from kvllm.compression.paged_store import PagedCandidates, PagedStore
from kvllm.compression.query_bank import QueryBank
from kvllm.compression.query_ring import oldest_entry
from kvllm.compression.rows import Due, RequestRows
from kvllm.compression.store import ALL_LAYERS
from kvllm.config import KvConfig
from kvllm.kernels.block_tables import join_segments_ref
from kvllm.layout import Geometry, ceil_div
from kvllm.methods.base import Kept

BLOCK_SIZE, MAX_LEN, NUM_REQS = 16, 1024, 4
NULL = 0


class TableStore(PagedStore):
    """Has no cache; reading and writing are tested with the engines."""

    def read(self, candidates: PagedCandidates, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def write(self, candidates: PagedCandidates, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        raise NotImplementedError

    def move(self, written: Tensor, homes: Tensor) -> None:
        raise NotImplementedError


def make_store(config: KvConfig) -> TableStore:
    bank = QueryBank.allocate(3, NUM_REQS, config.num_queries, 4, 2, 8, config.query_stride, torch.float32)
    return TableStore(config, bank, BLOCK_SIZE, MAX_LEN)


@dataclass
class Request:
    """held: the blocks that attention reads, in its order; scheduled: the scheduler's list; row: the worker's table."""

    row: int
    num_prompt_tokens: int
    geometry: Geometry
    held: list[int] = field(default_factory=list)
    scheduled: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)

    def grow(self, num_tokens: int, free: list[int]) -> None:
        while len(self.table) < ceil_div(num_tokens, BLOCK_SIZE):
            block = free.pop()
            for blocks in (self.held, self.scheduled, self.table):
                blocks.append(block)


CONFIGS = {
    "window": KvConfig(window_size=64, buffer_size=32, retention_ratio=0.4),
    "history": KvConfig(window_size=64, buffer_size=32, retention_ratio=0.4, history_size=64),
    "prompt": KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5, prompt_budget=32),
    "both": KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5, prompt_budget=32, history_size=64),
    "budget": KvConfig(
        policy="budget", window_size=64, buffer_size=32, budget_size=64, budget_interval=32, prompt_budget=16
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_survivors_over_many_events(name: str) -> None:
    """Three requests of other prompt lengths have every event together; the scheduler frees what the worker leaves."""
    config = CONFIGS[name]
    geometry = Geometry.from_config(config, BLOCK_SIZE)
    assert geometry is not None
    store, rows = make_store(config), RequestRows(config, NUM_REQS)
    requests = [Request(row, prompt, geometry) for row, prompt in ((2, 70), (0, 1), (3, 33))]
    free = list(range(1, 400))
    cuts = [geometry.shape(event).num_history > 0 for event in range(9)]
    assert any(cuts) == (name in ("history", "both", "budget")) and (name == "budget" or not all(cuts))
    for each in requests:
        rows.set(each.row, geometry, each.num_prompt_tokens, None)
    for event in range(9):
        computed = [geometry.event_at(each.num_prompt_tokens, event) for each in requests]
        for each, length in zip(requests, computed, strict=True):
            each.grow(length, free)
        # The table of a batch is a part of a wider one, and its rows of blocks that were freed are never rewritten.
        wide = torch.full((NUM_REQS, MAX_LEN // BLOCK_SIZE + 3), -1, dtype=torch.int32)
        for i, each in enumerate(requests):
            wide[i, : len(each.table)] = torch.tensor(each.table)
        table = wide[: len(requests), :-3]
        store.begin_step(table)
        due = rows.begin_step(np.array([r.row for r in requests]), np.array(computed), "abc")
        assert due == [Due(i, r.row, geometry, r.num_prompt_tokens, event) for i, r in enumerate(requests)]

        shape = geometry.shape(event)
        found = store.candidates(due)
        prompts = {
            d.row: store.prompt(d).blocks for d in due if event == 0 and geometry.prompt_shape(d.num_prompt_tokens)
        }
        ring = [store.bank.ring_start(r.row, oldest_entry(config, geometry, event)) for r in requests]
        assert found.ring_starts.tolist() == ring
        for i, each in enumerate(requests):
            start = geometry.candidate_start(each.num_prompt_tokens, event) // BLOCK_SIZE
            end = start + shape.num_candidates // BLOCK_SIZE
            assert found.blocks[i].tolist() == each.held[start:end]
            assert store.part(found, slice(i, i + 1)).blocks.tolist() == [each.held[start:end]]
            front = each.held[:start]
            if each.row in prompts:
                assert prompts[each.row].tolist() == [front]  # all of the prompt, and nothing else yet
                front = front[: config.prompt_budget // BLOCK_SIZE]
            each.held = [*front, *each.held[start : start + shape.num_kept // BLOCK_SIZE], *each.held[end:]]
            # The scheduler, which knows nothing of the worker's tables, comes to the same.
            free += close_gap(each.scheduled, NULL, geometry, each.num_prompt_tokens, event, BLOCK_SIZE)
            assert [block for block in each.scheduled if block != NULL] == each.held

        lengths = torch.tensor(computed, dtype=torch.int32)
        joined, physical, plan = table.clone(), torch.zeros_like(lengths), torch.zeros(4, 3, dtype=torch.int32)
        held_rows = [each.row for each in requests]
        plan[:3], plan[3] = torch.from_numpy(rows.columns[:3, held_rows]), torch.tensor(held_rows)
        join_segments_ref(joined, lengths, physical, store.survivor_blocks, plan, BLOCK_SIZE)
        for i, each in enumerate(requests):
            assert joined[i, : ceil_div(int(physical[i]), BLOCK_SIZE)].tolist() == each.held
    assert len(set(free)) == len(free) and len(free) + sum(len(each.held) for each in requests) == 399


def test_by_hand() -> None:
    """A prompt of two blocks, windows of four of which two stay: 10 to 13 become 10 and 11, 14 to 17 become 14, 15."""
    config = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5)
    geometry = Geometry.from_config(config, BLOCK_SIZE)
    assert geometry is not None
    store = make_store(config)
    store.begin_step(torch.tensor([[90, 91, *range(10, 30)]], dtype=torch.int32))
    assert store.candidates([Due(0, 1, geometry, 20, 0)]).blocks.tolist() == [[10, 11, 12, 13]]
    assert store.survivor_blocks[1, 2:4].tolist() == [10, 11]
    assert store.candidates([Due(0, 1, geometry, 20, 1)]).blocks.tolist() == [[14, 15, 16, 17]]
    assert store.survivor_blocks[1, 2:6].tolist() == [10, 11, 14, 15]
    assert not store.survivor_blocks[[0, 2, 3]].any()


def test_by_hand_with_a_limit_on_the_history() -> None:
    """Four blocks at most, three after a cut: the third event reads the four survivors and a window of four."""
    config = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5, history_size=64)
    geometry = Geometry.from_config(config, BLOCK_SIZE)
    assert geometry is not None
    store = make_store(config)
    store.begin_step(torch.tensor([[90, 91, *range(10, 30)]], dtype=torch.int32))
    for event in (0, 1):
        store.candidates([Due(0, 1, geometry, 20, event)])
    assert store.candidates([Due(0, 1, geometry, 20, 2)]).blocks.tolist() == [[10, 11, 14, 15, 18, 19, 20, 21]]
    assert store.survivor_blocks[1, 2:5].tolist() == [10, 11, 14]


def test_queries_are_those_of_each_event_and_layer() -> None:
    """[event, layer], oldest first: a ring is read from where its oldest query lies."""
    store: Any = make_store(CONFIGS["window"])
    num_layers, num_reqs, num_queries = store.bank.queries.shape[:3]
    labels = torch.arange(num_layers * num_reqs * num_queries).view(num_layers, num_reqs, num_queries, 1)
    store.bank.scales[:] = 1
    store.bank.queries[:] = labels[..., None]
    starts = torch.tensor([store.bank.ring_start(3, 5), store.bank.ring_start(0, 0)])
    found = store.queries(PagedCandidates(torch.zeros(2, 1), starts))
    assert found.shape == (2 * num_layers, num_queries, 4, 8)
    for i, (row, oldest) in enumerate(((3, 5), (0, 0))):
        for layer in range(num_layers):
            expected = labels[layer, row].roll(-oldest, dims=0)[:, 0]
            assert found[i * num_layers + layer, :, 0, 0].tolist() == expected.tolist()
    some = store.queries(PagedCandidates(torch.zeros(2, 1), starts[:1]), slice(1, 3))
    assert torch.equal(some, found[1:3])
