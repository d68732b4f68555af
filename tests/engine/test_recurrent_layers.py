"""What allocator blocks larger than the kernels' need, without an engine; those beside recurrent layers run on GPUs."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvllm.compression.blocks import blocks_held
from kvllm.engine.admission import most_ahead
from kvllm.engine.attention import in_kernel_blocks
from kvllm.engine.patches import with_zeroed_kernel_blocks
from kvllm.engine.scheduler import chunk_of_states
from kvllm.layout import Geometry
from tests.engine.conftest import BLOCK_SIZE, CONFIG


@pytest.mark.parametrize("block_size", [16, 272])
def test_chunks_end_where_states_may_be_kept(block_size: int) -> None:
    """A chunk that crosses a boundary ends at one, and no chunk is empty."""
    rng = random.Random(0)
    for _ in range(1000):
        start, most = rng.randrange(4 * block_size), rng.randrange(1, 4 * block_size)
        end = start + chunk_of_states(start, most, block_size)
        assert start < end <= start + most
        assert end % block_size == 0 or end // block_size == start // block_size


def test_a_table_in_kernel_blocks() -> None:
    table = torch.tensor([[3, 0], [7, 2]], dtype=torch.int32)
    expected = [[9, 10, 11, 0, 1, 2], [21, 22, 23, 6, 7, 8]]
    assert in_kernel_blocks(table, 3).tolist() == expected
    out = torch.full((4, 6), -1, dtype=torch.int32)
    made = in_kernel_blocks(table, 3, out)
    assert made.tolist() == expected and made.data_ptr() == out.data_ptr() and (out[2:] == -1).all()
    assert in_kernel_blocks(table, 1) is table


def test_new_blocks_are_zeroed_in_the_kernels_blocks() -> None:
    zeroed: list[int] = []
    zero = with_zeroed_kernel_blocks(lambda self, block_ids: zeroed.extend(block_ids))
    zero(SimpleNamespace(kv_compressor=SimpleNamespace(blocks_per_block=2)), [1, 4])
    zero(SimpleNamespace(kv_compressor=None), [5])
    assert zeroed == [2, 3, 8, 9, 5]


def test_admission_looks_one_block_ahead() -> None:
    """One request gains two blocks and gives one back, the other ends."""
    gained = np.array([0] * 4 + [1] * 8 + [2] * 3 + [1] * 2)

    def held(steps: Any) -> Any:
        return np.stack([2 + gained[steps[:, 0]], np.full(len(steps), 5)], axis=1)

    assert most_ahead(held, np.array([100, 100]), 16) == 2
    assert most_ahead(held, np.array([100, 3]), 16) == 0  # before the other ends, nothing is gained


def test_blocks_held_broadcasts() -> None:
    geometry = Geometry.from_config(CONFIG, BLOCK_SIZE)
    assert geometry is not None
    prompt, computed = np.array([5, 300]), np.arange(0, 512, 64)[:, None] + 300
    together = blocks_held(geometry, prompt, computed, 128)
    assert together.shape == (8, 2)
    assert together[3, 1] == blocks_held(geometry, prompt[1:], computed[3], 128)[0]
