"""Locates the candidates and survivors of running requests in a paged cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvllm.compression.blocks import BlockNames
from kvllm.compression.query_bank import QueryBank
from kvllm.compression.query_ring import oldest_entry
from kvllm.compression.rows import Due
from kvllm.compression.store import ALL_LAYERS
from kvllm.config import KvConfig
from kvllm.layout import ceil_div
from kvllm.methods.base import Kept


@dataclass(frozen=True)
class PagedCandidates:
    """blocks:      [num_due, num_candidates / block_size], block ids
    ring_starts: [num_due], `QueryBank.ring_start` of each
    """

    blocks: Tensor
    ring_starts: Tensor


class PagedStore(ABC):
    """Finds candidates in vLLM's block table, and tracks which blocks hold the survivors of each request.

    vLLM's table has an entry for every logical block of a request. Survivors, which move to the end of the prefix, have
    a table of their own, and the two are joined for attention (`kvllm.kernels.block_tables`).

    If allocator blocks are larger than kernel blocks, an event's blocks may hold other tokens too. Its survivors then
    move to the blocks that `kvllm.compression.blocks` chooses, once all events of the step are done (`settle`).

    survivor_blocks: [max_num_reqs, max_blocks] int32, block ids by physical index; only the entries of the prefix
                     segment's survivors are valid
    to_device:       makes an int64 tensor of a list of numbers, on the cache's device
    """

    max_batch = 1

    def __init__(
        self,
        config: KvConfig,
        bank: QueryBank,
        block_size: int,
        max_model_len: int,
        to_device: Callable[[list[int]], Tensor] = torch.tensor,
    ) -> None:
        self.config = config
        self.bank = bank
        self.num_layers, max_num_reqs = bank.queries.shape[:2]
        self.num_kv_heads = bank.num_kv_heads
        self.block_size = block_size
        self.to_device = to_device
        shape = (max_num_reqs, ceil_div(max_model_len, block_size))
        self.survivor_blocks = torch.zeros(shape, dtype=torch.int32, device=bank.queries.device)
        self.block_table: Tensor | None = None
        self.allocator_block_size = block_size
        self._names: dict[int, BlockNames] = {}  # by row
        self._moves: list[tuple[Tensor, Tensor]] = []

    def begin_step(self, block_table: Tensor) -> None:
        """block_table: [num_reqs, any] int32, vLLM's block table of the step's batch, by logical index"""
        self.block_table = block_table

    def candidates(self, due: Sequence[Due]) -> PagedCandidates:
        """The candidates, survivors before raw tokens. After the event the first blocks hold its survivors, until
        `settle` moves them.
        """
        assert self.block_table is not None
        table, width, own_width = self.block_table, self.block_table.stride(0), self.survivor_blocks.stride(0)
        shape = due[0].geometry.shape(due[0].event)
        num_history, num_raw = shape.num_history // self.block_size, shape.num_raw // self.block_size
        num_kept = due[0].geometry.num_kept_blocks(due[0].event)
        starts: list[int] = []
        history: list[int] = []
        raw: list[int] = []
        kept: list[int] = []
        moved: list[int] = []
        for each in due:
            prompt, event = each.num_prompt_tokens, each.event
            first = each.geometry.prompt_len(prompt, event + 1) + each.geometry.num_left_alone(event)
            tail = each.geometry.tail_start(prompt, event) // self.block_size
            row = each.row * own_width + first // self.block_size
            starts.append(self._ring_start(each))
            history += range(row, row + num_history)
            raw += range(each.batch_index * width + tail, each.batch_index * width + tail + num_raw)
            kept += range(row, row + num_kept)
            if self.allocator_block_size > self.block_size:
                moved += [each.batch_index * width + column for column in self._columns_after(each)]
        parts = [starts, raw, history, kept, moved]
        sent = self.to_device([number for part in parts for number in part])
        ring_starts, raw_index, history_index, kept_index, moved_index = sent.split([len(part) for part in parts])
        blocks = _flat(table).index_select(0, raw_index).view(len(due), -1)
        survivors = self.survivor_blocks.view(-1)
        if num_history:
            blocks = torch.cat([survivors.index_select(0, history_index).view(len(due), -1), blocks], dim=1)
        homes = blocks[:, :num_kept].reshape(-1)
        if moved:
            written, homes = homes, _flat(table).index_select(0, moved_index)
            self._moves.append((written.long(), homes.long()))
        survivors.index_copy_(0, kept_index, homes)
        return PagedCandidates(blocks, ring_starts)

    def _columns_after(self, due: Due) -> list[int]:
        """Columns of the block table whose blocks hold the event's survivors after `settle`."""
        if due.event == 0:
            self._names[due.row] = BlockNames(due.geometry, due.num_prompt_tokens, self.allocator_block_size)
        return self._names[due.row].close_gap(due.event)

    def settle(self) -> None:
        """Move the survivors of the step's events out of blocks that will be freed."""
        for written, homes in self._moves:
            self.move(written, homes)
        self._moves.clear()

    def prompt(self, due: Due) -> PagedCandidates:
        assert self.block_table is not None
        cut = due.geometry.prompt_shape(due.num_prompt_tokens)
        assert cut is not None
        blocks = self.block_table[due.batch_index : due.batch_index + 1, : cut.num_raw // self.block_size]
        return PagedCandidates(blocks, self.to_device([self._ring_start(due)]))

    def part(self, candidates: PagedCandidates, events: slice) -> PagedCandidates:
        return PagedCandidates(candidates.blocks[events], candidates.ring_starts[events])

    def queries(self, candidates: PagedCandidates, layers: slice = ALL_LAYERS) -> Tensor:
        return self.bank.of(candidates.ring_starts, layers).transpose(0, 1).flatten(0, 1)

    @abstractmethod
    def read(self, candidates: PagedCandidates, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        """As of `Store`."""

    @abstractmethod
    def write(self, candidates: PagedCandidates, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        """As of `Store`."""

    @abstractmethod
    def move(self, written: Tensor, homes: Tensor) -> None:
        """Copy whole blocks of all layers from `written` to `homes`, as if all were read before any is written.

        written, homes: [num_blocks] int64, block ids
        """

    def _ring_start(self, due: Due) -> int:
        return self.bank.ring_start(due.row, oldest_entry(self.config, due.geometry, due.event))


def _flat(table: Tensor) -> Tensor:
    """A 1-d view of the table: entry (i, j) is at i * stride + j; the stride may exceed the number of columns."""
    return table.as_strided(((len(table) - 1) * table.stride(0) + table.shape[1],), (1,))
