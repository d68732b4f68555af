from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvllm.compression.query_bank import QueryBank
from kvllm.compression.rounding import Rounding, packed_block_tokens
from kvllm.kernels.packed import attend
from kvllm.kernels.packed.attend import (
    MOST_PARTS,
    Batch,
    PackedAttention,
    Plain,
    attend_plain_ref,
    max_parts,
    merge_packed_ref,
    part_counts,
    plan_parts,
)
from kvllm.kernels.packed.layout import PackedLayout
from kvllm.kernels.packed.pack import pack_ref
from kvllm.kernels.store_tokens import NewPairs, store_tokens
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
    monkeypatch.setattr(attend, "SLOTS", 15)
    packed = [0, 2, 7, 0, 1, 4, 0, 3, 7, 1]
    check_merge(16, 2, 1, 64, torch.float32, False, 0.0, [1] * len(packed), packed, device, num_layers=1)


DECODES = [
    # Packed blocks and plain tokens of each request; the last, without either, is padding.
    ([0, 1, 17, 3], [5, 64, 33, 0]),
    ([0, 0, 2, 0], [90, 1, 16, 0]),
]


@pytest.mark.parametrize("packed, lengths", DECODES)
@pytest.mark.parametrize(
    "block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap",
    [shape for shape in SHAPES if shape[4] != torch.float8_e4m3fn],
)
def test_decode(block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap, packed, lengths, device):
    check_decode(block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap, packed, lengths, device)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_decode_of_many_parts(with_sinks, device, monkeypatch):
    """With more plain tokens than the host assumed, and fewer; parts of both kinds, and parts without blocks."""
    monkeypatch.setattr(attend, "LEAST_BLOCKS", 1)
    monkeypatch.setattr(attend, "SLOTS", 45)
    packed, lengths = [0, 2, 7, 0, 1, 4, 0], [600, 5, 40, 1, 17, 90, 0]
    check_decode(
        16, 2, 1, 64, torch.float32, False, 0.0, packed, lengths, device, assumed=[550, 5, 200, 30, 17, 90, 0],
        with_sinks=with_sinks,
    )  # fmt: skip


def test_decode_reads_tokens_stored_right_before_it(device):
    """Also where its programs start before the kernel that stores them has ended."""
    lengths = [5, 64, 33]
    case = Case(16, 8, 2, 128, torch.bfloat16, False, 0.0, [1, 1, 1], [0, 1, 3], lengths, device, num_layers=1)
    bank = QueryBank.allocate(1, 3, 4, 8, 2, 128, 8, torch.bfloat16, device)
    slots = [int(case.plain.block_table[i, (n - 1) // 16]) * 16 + (n - 1) % 16 for i, n in enumerate(lengths)]
    codes = torch.full((3,), -1, dtype=torch.int32, device=device)
    keys, values = case.cache.keys[0], case.cache.values[0]
    for seed in range(3 if device == "cpu" else 50):
        generator = torch.Generator().manual_seed(seed)
        key, value = (torch.randn(3, 2, 128, generator=generator).mul(4).bfloat16().to(device) for _ in range(2))
        actual, pairs = torch.empty_like(case.output), NewPairs(key, value, case.cache, torch.tensor(slots).to(device))
        store_tokens(case.query, bank, 0, codes, pairs, case.attention.overlap)
        case.attention.decode(actual, case.query, keys, values, case.batch, case.plain, case.scale)
        output, lse = attend_plain_ref(case.query, keys, values, case.plain, case.scale)
        case.assert_close(actual, case.merged(output, lse, keys, values))


class Case:
    """Requests with these counts of query tokens, packed blocks and plain tokens, in a cache of these shapes.

    assumed: plain tokens for which the host plans, if not `lengths`
    """

    def __init__(
        self, block_size, num_heads, num_kv_heads, head_dim, dtype, token_major, soft_cap, counts, packed, lengths,
        device, num_layers=2, assumed=None,
    ):  # fmt: skip
        rounding = Rounding(4, packed_block_tokens(block_size, head_dim, 4, cache_dtype_of(dtype)))
        num_plain = -(-np.array(lengths) // block_size)
        pool = 4 * sum(packed) + int(num_plain.sum()) + 8
        self.cache = cache = random_cache(
            num_layers=num_layers, num_blocks=pool, block_size=block_size, num_kv_heads=num_kv_heads,
            head_dim=head_dim, dtype=dtype, device=device, token_major=token_major,
        )  # fmt: skip
        self.layout = layout = PackedLayout.of(cache, rounding)
        per_block = -(-layout.num_tokens // block_size)
        survivors = torch.full((len(counts) + 3, max(packed) + 5), -1, dtype=torch.int32, device=device)
        plan = torch.full((6, len(counts) + 1), -7, dtype=torch.int32, device=device)
        order = random_blocks(1, pool, pool, device)[0]
        for i, num_blocks in enumerate(packed):
            row, first = len(counts) - i + 1, 2 * i % 5
            plan[:4, i] = torch.tensor([first, first + num_blocks, 99, row])
            for j in range(num_blocks):
                own, order = order[:per_block], order[per_block:]
                pack_ref(own[None, :], layout.num_tokens, cache, rounding)
                survivors[row, first + j] = own[0]
        table = torch.full((len(counts), max(num_plain) + 2), -1, dtype=torch.int32, device=device)
        for i, num_blocks in enumerate(num_plain.tolist()):
            table[i, :num_blocks], order = order[:num_blocks], order[num_blocks:]
        for layer in (*cache.keys, *cache.values):
            layer.view(torch.uint8)[order.long()] = 0xFF  # NaN: what no request reads
        self.plain = Plain(table, torch.tensor(lengths, dtype=torch.int32, device=device))
        alone = np.array(packed) * (np.array(counts) == 1)
        planned = -(-np.array(assumed or lengths) // block_size)
        rows, parts = np.zeros((2, len(counts) + 1), np.int32), np.zeros(max_parts(len(counts), num_kv_heads), np.int32)
        plan_parts(alone, planned, num_kv_heads, rows, parts)
        plan[4:] = torch.from_numpy(rows)
        generator = torch.Generator().manual_seed(1)
        shape = (sum(counts), num_heads, head_dim)
        query, output = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        self.query = (query * 2).to(dtype)
        self.output = output.to(torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype)
        self.lse = torch.randn(num_heads, sum(counts), generator=generator).to(device) + 5
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
        self.batch = Batch(starts, survivors, plan, torch.from_numpy(parts).to(device))
        self.scale, self.soft_cap = head_dim**-0.5, soft_cap
        self.attention = PackedAttention(layout, num_heads, num_kv_heads, len(counts), device, soft_cap)

    def layers(self):
        for keys, values in zip(self.cache.keys, self.cache.values, strict=True):
            self.attention.outputs.fill_(torch.nan)
            self.attention.lse.fill_(torch.nan)
            yield keys, values

    def merged(self, output, lse, keys, values):
        merge_packed_ref(
            output, lse, self.query, keys, values, self.batch, self.layout, self.scale, self.soft_cap
        )  # fmt: skip
        return output

    def assert_close(self, actual, expected):
        # Keys are restored, and probabilities multiplied, in the model's dtype.
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[actual.dtype]
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def check_merge(*shape_and_requests, **others):
    *shape, counts, packed, device = shape_and_requests
    lengths = [20 + 7 * i for i in range(len(counts))]  # planned for the kernel that reads plain tokens: not read here
    case = Case(*[*shape, counts, packed, lengths, device], **others)
    for keys, values in case.layers():
        expected, actual = case.merged(case.output.clone(), case.lse, keys, values), case.output.clone()
        case.attention.merge(
            actual, case.lse, case.query, keys, values, case.batch, case.scale, prefill=max(counts) > 1
        )  # fmt: skip
        case.assert_close(actual, expected)


def check_decode(*shape_and_requests, with_sinks=False, **others):
    *shape, packed, lengths, device = shape_and_requests
    case = Case(*[*shape, [1] * len(packed), packed, lengths, device], **others)
    sinks = torch.linspace(-1, 3, shape[1], device=device) if with_sinks else None
    for i, length in enumerate(lengths):
        if not length and not packed[i]:
            case.batch.plan[:4, i] = 0
    for keys, values in case.layers():
        output, lse = attend_plain_ref(case.query, keys, values, case.plain, case.scale, case.soft_cap, sinks)
        actual = torch.full_like(case.output, torch.nan)
        case.attention.decode(actual, case.query, keys, values, case.batch, case.plain, case.scale, sinks)
        case.assert_close(actual, case.merged(output, lse, keys, values))


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 900)), min_size=1, max_size=300),
    st.sampled_from([1, 2, 8, 40]),
)
def test_parts_cover_every_block_in_a_launch_of_known_size(num_blocks, num_kv_heads):
    blocks = np.array(num_blocks)
    num_reqs, most = len(blocks), max_parts(len(blocks), num_kv_heads)
    rows, programs = np.full((2, num_reqs + 1), -7, np.int32), np.full(most, -7, np.int32)
    plan_parts(blocks[:, 0], blocks[:, 1], num_kv_heads, rows, programs)
    counts = np.diff(rows[0, :num_reqs], prepend=0)
    kinds = np.stack([rows[1, :num_reqs], counts - rows[1, :num_reqs]], axis=1)
    assert rows[0, num_reqs] == rows[0, num_reqs - 1] <= most
    taken = programs[: rows[0, -1]]
    assert sorted(zip(taken & 0xFFFF, taken >> 16, strict=True)) == [
        (i, j) for i, n in enumerate(counts) for j in range(n)
    ]
    assert (programs[len(taken) :] == -1).all()
    plain = (taken >> 16) >= kinds[taken & 0xFFFF, 0]
    sizes = (blocks / np.maximum(kinds, 1))[taken & 0xFFFF, plain.astype(int)]
    assert (np.diff(sizes) <= 0).all()
    assert ((kinds > 0) == (blocks > 0)).all()
    assert (kinds <= blocks).all()
    assert (kinds <= MOST_PARTS).all()


@pytest.mark.parametrize(
    "blocks, parts",
    [
        ([37] * 64, [2] * 64),  # 1,024 programs of 8 KV heads, in one wave of 1,056
        ([146] * 64 + [38] * 64, [3] * 64 + [1] * 64),  # two waves of at most 49 blocks, not one of 146
        ([512], [128]),
        ([16], [4]),
        ([8192] + [1] * 300, [128] + [1] * 300),
    ],
)
def test_parts_end_together(blocks, parts):
    assert part_counts(np.array(blocks), 8).tolist() == parts
