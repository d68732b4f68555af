from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvllm.compression.rounding import Rounding, packed_block_tokens
from kvllm.kernels.packed import attend
from kvllm.kernels.packed.attend import (
    Batch,
    PackedAttention,
    max_parts,
    merge_packed_ref,
    order_parts,
    plan_parts,
)
from kvllm.kernels.packed.layout import PackedLayout
from kvllm.kernels.packed.pack import pack_ref
from tests.kernels.paged_caches import cache_dtype_of, random_blocks, random_cache

SHAPES = [
    # block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap
    (16, 8, 2, 128, torch.bfloat16, False, 0.0),
    (16, 3, 3, 64, torch.float16, True, 0.0),
    (16, 10, 2, 256, torch.bfloat16, False, 5.0),
    (32, 6, 1, 64, torch.float32, True, 3.0),
    (16, 14, 1, 96, torch.bfloat16, False, 0.0),
    (32, 8, 2, 128, torch.float8_e4m3fn, False, 0.0),
    (16, 8, 1, 64, torch.float8_e4m3fn, True, 0.0),
]
# Query tokens and packed blocks of each request: none packed, one, several programs' share, prefill chunks.
BATCHES = [
    ([1, 1, 1], [0, 1, 17]),
    ([1, 5, 1, 9], [2, 3, 0, 0]),
    ([19, 1], [3, 9]),
]


@pytest.mark.parametrize("counts, packed", BATCHES)
@pytest.mark.parametrize("block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap", SHAPES)
def test_merge(block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap, counts, packed, device):
    check_merge(block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap, counts, packed, device)


def test_merge_of_many_requests(device, monkeypatch):
    """Some without packed blocks, others divided into up to four parts, which programs take in another order."""
    monkeypatch.setattr(attend, "LEAST_BLOCKS", 1)
    monkeypatch.setattr(attend, "MOST_PROGRAMS", 15)
    packed = [0, 2, 7, 0, 1, 4, 0, 3, 7, 1]
    check_merge(16, 2, 1, 64, torch.float32, False, 0.0, [1] * len(packed), packed, device, num_layers=1)


def check_merge(
    block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap, counts, packed, device, num_layers=2
):
    rounding = Rounding(4, packed_block_tokens(block_size, head_dim, 4, cache_dtype_of(dtype)))
    pool = 4 * sum(packed) + 8
    cache = random_cache(
        num_layers=num_layers, num_blocks=pool, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype, device=device, token_major=token_major,
    )  # fmt: skip
    layout = PackedLayout.of(cache, rounding)
    per_block = -(-layout.num_tokens // block_size)
    survivors = torch.full((len(counts) + 3, max(packed) + 5), -1, dtype=torch.int32, device=device)
    plan = torch.full((5, len(counts) + 1), -7, dtype=torch.int32, device=device)
    order = random_blocks(1, pool, pool, device)[0]
    for i, num_blocks in enumerate(packed):
        row, first = len(counts) - i + 1, 2 * i % 5
        plan[:4, i] = torch.tensor([first, first + num_blocks, 99, row])
        for j in range(num_blocks):
            own, order = order[:per_block], order[per_block:]
            pack_ref(own[None, :], layout.num_tokens, cache, rounding)
            survivors[row, first + j] = own[0]
    alone = np.array(packed) * (np.array(counts) == 1)
    plan[4, : len(counts)] = torch.from_numpy(ends := plan_parts(alone, num_kv_heads))
    parts = np.zeros(max_parts(len(counts), num_kv_heads), np.int32)
    order_parts(alone, ends, parts)
    generator = torch.Generator().manual_seed(1)
    shape = (sum(counts), num_heads, head_dim)
    query, output = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    query = (query * 2).to(dtype)
    output = output.to(torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype)
    lse = torch.randn(num_heads, sum(counts), generator=generator).to(device) + 5
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
    batch, scale = Batch(starts, survivors, plan, torch.from_numpy(parts).to(device)), head_dim**-0.5
    attention = PackedAttention(layout, num_heads, num_kv_heads, len(counts), device, soft_cap)
    for layer in range(cache.num_layers):
        expected, actual = output.clone(), output.clone()
        attention.outputs.fill_(torch.nan)
        attention.lse.fill_(torch.nan)
        merge_packed_ref(expected, lse, query, cache.keys[layer], cache.values[layer], batch, layout, scale, soft_cap)
        attention.merge(
            actual, lse, query, cache.keys[layer], cache.values[layer], batch, scale, prefill=max(counts) > 1
        )
        # Keys are restored, and probabilities multiplied, in the model's dtype.
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[output.dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=300), st.sampled_from([1, 2, 8, 40]))
def test_parts_cover_every_block_in_a_launch_of_known_size(num_blocks, num_kv_heads):
    ends = plan_parts(np.array(num_blocks), num_kv_heads)
    counts = np.diff(ends, prepend=0)
    assert ends[-1] <= max_parts(len(num_blocks), num_kv_heads)
    programs = np.zeros(max_parts(len(num_blocks), num_kv_heads), np.int32)
    order_parts(np.array(num_blocks), ends, programs)
    taken = programs[: ends[-1]]
    assert sorted(zip(taken & 0xFFFF, taken >> 16, strict=True)) == [
        (i, j) for i, n in enumerate(counts) for j in range(n)
    ]
    assert (programs[ends[-1] :] == -1).all()
    sizes = [num_blocks[i] / counts[i] for i in taken & 0xFFFF]
    assert sizes == sorted(sizes, reverse=True)
    assert all(
        (count > 0) == (blocks > 0) and count <= blocks for count, blocks in zip(counts, num_blocks, strict=True)
    )
