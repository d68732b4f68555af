"""Requests in one pool, with allocator blocks of kernel size and larger: no data is lost or shared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvllm.compression.blocks import BlockNames, blocks_held, close_gap, num_spares, peak_allocator_blocks
from kvllm.config import KvConfig
from kvllm.layout import Geometry, ceil_div

KERNEL_BLOCK = 16
ALLOCATOR_BLOCKS = (16, 32, 528, 784, 2848)
NULL = -1


@dataclass
class Pool:
    """Blocks, and what each of their kernel blocks holds; a freed block is handed out next, with its contents."""

    size: int
    free: list[int] = field(default_factory=list)
    memory: dict[tuple[int, int], Any] = field(default_factory=dict)
    num_blocks: int = 0

    def take(self) -> int:
        if not self.free:
            self.free.append(self.num_blocks)
            self.num_blocks += 1
        return self.free.pop()


@dataclass
class Request:
    """One request, kernel block by kernel block; `expected` is what attention must read."""

    name: str
    geometry: Geometry
    num_prompt_tokens: int
    pool: Pool
    blocks: list[int] = field(default_factory=list)
    expected: list[Any] = field(default_factory=list)
    computed: int = 0
    num_events: int = 0
    peak: int = 0
    allocated: list[int] = field(default_factory=list)  # as a worker's table keeps them

    def __post_init__(self) -> None:
        self.names = BlockNames(self.geometry, self.num_prompt_tokens, self.pool.size)

    def row(self, index: int) -> tuple[int, int]:
        """The cache row of kernel block `index` of the list."""
        per_block = self.pool.size // KERNEL_BLOCK
        block = self.blocks[index // per_block]
        assert block != NULL
        return block, index % per_block

    def rows(self) -> list[tuple[int, int]]:
        """The cache rows of the kernel blocks that attention reads, in order."""
        prefix = self.geometry.prefix_len(self.num_prompt_tokens, self.num_events) // KERNEL_BLOCK
        tail = self.geometry.tail_start(self.num_prompt_tokens, self.num_events) // KERNEL_BLOCK
        end = ceil_div(self.computed, KERNEL_BLOCK)
        rows = [*range(prefix), *range(tail, end)] if self.num_events else [*range(end)]
        return [self.row(i) for i in rows]

    def read(self) -> list[Any]:
        return [self.pool.memory[row] for row in self.rows()]

    def compress_if_due(self) -> None:
        g, prompt = self.geometry, self.num_prompt_tokens
        if g.num_events(prompt, self.computed) == self.num_events:
            return
        event, shape = self.num_events, g.shape(self.num_events)
        before = self.read()
        assert before == self.expected
        start, width = g.candidate_start(prompt, event) // KERNEL_BLOCK, shape.num_candidates // KERNEL_BLOCK
        front, survivors = before[:start], before[start : start + width][: shape.num_kept // KERNEL_BLOCK]
        if event == 0 and (cut := g.prompt_shape(prompt)):
            front = front[: cut.num_kept // KERNEL_BLOCK]
        own = [b for b in self.blocks if b != NULL]
        candidates = self.rows()[start : start + width]
        freed = close_gap(self.blocks, NULL, g, prompt, event, self.pool.size)
        assert sorted(freed + [b for b in self.blocks if b != NULL]) == sorted(own)
        self.num_events += 1
        first = g.prefix_len(prompt, self.num_events) // KERNEL_BLOCK - len(survivors)
        homes = [divmod(column, self.pool.size // KERNEL_BLOCK) for column in self.names.close_gap(event)]
        assert [(self.allocated[n], part) for n, part in homes] == [self.row(first + i) for i in range(len(survivors))]
        if self.pool.size == KERNEL_BLOCK:  # so that survivors can be written over the candidates, in place
            assert [self.row(first + i) for i in range(len(survivors))] == candidates[: len(survivors)]
        for i, content in enumerate(survivors):
            self.pool.memory[self.row(first + i)] = content
        self.expected = [*front, *survivors, *before[start + width :]]
        assert self.read() == self.expected  # before anybody else can write to what was freed
        self.pool.free += freed

    def step(self, num_new: int) -> None:
        """Compute up to the end of at most one kernel block."""
        self.compress_if_due()
        while len(self.blocks) < ceil_div(self.computed + num_new, self.pool.size):
            self.allocated.append(self.pool.take())
            self.blocks.append(self.allocated[-1])
        index = self.computed // KERNEL_BLOCK
        content = (self.name, index)
        if self.computed % KERNEL_BLOCK == 0:
            self.expected.append(content)
        self.pool.memory[self.row(index)] = content
        self.computed += num_new
        held = sum(b != NULL for b in self.blocks)
        self.peak = max(self.peak, held)
        assert self.peak <= peak_allocator_blocks(self.geometry, self.num_prompt_tokens, self.computed, self.pool.size)
        if self.geometry.num_events(self.num_prompt_tokens, self.computed) == self.num_events:
            prompt, computed = np.array([self.num_prompt_tokens]), np.array([self.computed])
            expected = int(blocks_held(self.geometry, prompt, computed, self.pool.size)[0])
            # A spare block may not have been emptied yet.
            assert expected - (self.pool.size > KERNEL_BLOCK) <= held <= expected
        if self.pool.size == KERNEL_BLOCK:
            exact = self.geometry.physical_len(self.num_prompt_tokens, self.computed - num_new) + num_new
            assert held == ceil_div(exact, KERNEL_BLOCK)
            assert self.peak == self.geometry.peak_blocks(self.num_prompt_tokens, self.computed)


def configs() -> st.SearchStrategy[KvConfig]:
    windows: Any = st.builds(
        dict, window_size=st.sampled_from([64, 256, 1024]), retention_ratio=st.floats(0.25, 0.99),
        history_size=st.sampled_from([0, 0, 1024, 2048]), buffer_size=st.sampled_from([8, 128]),
        prompt_budget=st.sampled_from([0, 64, 512]),
    )  # fmt: skip
    budgets: Any = st.builds(
        dict, policy=st.just("budget"), window_size=st.just(64), budget_size=st.sampled_from([64, 768]),
        budget_interval=st.sampled_from([16, 128]), buffer_size=st.sampled_from([8, 128]),
        prompt_budget=st.sampled_from([0, 64]),
    )  # fmt: skip
    return st.one_of(windows, budgets).map(lambda options: KvConfig(method="recent", query_stride=8, **options))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALLOCATOR_BLOCKS),
    st.lists(st.tuples(configs(), st.integers(1, 3000)), min_size=1, max_size=2),
    st.randoms(use_true_random=False),
)
def test_requests_in_one_pool(size: int, drawn: list[tuple[KvConfig, int]], random: Any) -> None:
    """Invariants 3 to 5: every request reads its own tokens only, and the pool is whole at the end."""
    pool, requests = Pool(size), []
    for i, (config, prompt) in enumerate(drawn):
        geometry = Geometry.from_config(config, KERNEL_BLOCK)
        assert geometry is not None
        requests.append(Request(str(i), geometry, prompt, pool))
    for _ in range(400):
        request = random.choice(requests)
        room = KERNEL_BLOCK - request.computed % KERNEL_BLOCK
        for _ in range(random.randint(1, 4)):
            chunk = min(room, request.geometry.max_chunk(request.num_prompt_tokens, request.computed))
            request.step(chunk)
            room = KERNEL_BLOCK - request.computed % KERNEL_BLOCK
    for request in requests:
        assert request.read() == request.expected
        pool.free += [b for b in request.blocks if b != NULL]
    assert sorted(pool.free) == list(range(pool.num_blocks))


@pytest.mark.parametrize("size, window, spares", [(16, 256, 0), (32, 256, 0), (528, 256, 1), (784, 1568, 0)])
def test_blocks_held_back(size: int, window: int, spares: int) -> None:
    geometry = Geometry.from_config(KvConfig(method="recent", window_size=window), KERNEL_BLOCK)
    assert geometry is not None and num_spares(geometry, size) == spares
