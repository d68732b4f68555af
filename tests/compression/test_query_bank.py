"""The query bank against rings that are written one token and one head at a time."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from kvllm.compression.query_bank import QueryBank, dequantize, quantize
from kvllm.compression.query_ring import oldest_entry, query_shifts
from kvllm.compression.rows import Due
from kvllm.config import KvConfig
from kvllm.layout import Geometry
from kvllm.reference.cache import DenseStore, LayerCache

HEAD_DIM, MAX_REQS = 8, 3


def bank_of(num_queries: int, num_kv_heads: int, group_size: int, stride: int) -> QueryBank:
    """A bank of two layers, filled with values that must be overwritten."""
    bank = QueryBank.allocate(
        2, MAX_REQS, num_queries, num_kv_heads * group_size, num_kv_heads, HEAD_DIM, stride, torch.bfloat16
    )
    bank.queries.fill_(77)
    bank.scales.fill_(-1.0)
    return bank


def rounded(vector: torch.Tensor) -> list[float]:
    """A vector in whole steps of a seventh of its largest number, which is rounded to eight bits; in Python floats."""
    mantissa, exponent = math.frexp(max(abs(float(x)) for x in vector) / 7)
    step = math.ldexp(round(mantissa * 2**8), exponent - 8)
    return [round(float(x) / step) * step for x in vector]


def newest_of_a_head(num_tokens: int, num_queries: int, stride: int, shift: int) -> list[int]:
    """The token in each entry of a head's ring after `num_tokens`, which it is offered one by one."""
    ring, taken = [-1] * num_queries, 0
    for offset in range(num_tokens):
        if offset % stride == stride - 1 - shift:
            ring[taken % num_queries] = offset
            taken += 1
    return ring


@pytest.mark.parametrize(
    "num_kv_heads, group_size, stride, num_queries",
    [(1, 1, 1, 4), (2, 3, 4, 2), (2, 4, 4, 3), (1, 8, 4, 4), (3, 2, 8, 1), (2, 3, 1, 5)],
)
@pytest.mark.parametrize("sizes", [[1], [5, 1, 1, 2], [100], [3, 64, 1]])
def test_storing_chunks_equals_storing_single_tokens(num_kv_heads, group_size, stride, num_queries, sizes):
    """Three requests of different lengths in one batch; of a chunk longer than the ring only the newest are stored."""
    bank = bank_of(num_queries, num_kv_heads, group_size, stride)
    assert (bank.num_queries, bank.group_size, bank.period) == (num_queries, group_size, num_queries * stride)
    generator = torch.Generator().manual_seed(0)
    lengths = np.array([67, 100, 2 * bank.period])
    num_heads = num_kv_heads * group_size
    texts = [torch.randn(int(n), num_heads, HEAD_DIM, generator=generator) for n in lengths]
    done, step = np.zeros(3, np.int64), 0
    while (done < lengths).any():
        ends = np.minimum(done + sizes[step % len(sizes)], lengths)
        tokens, codes = [], []
        for row, (start, end) in enumerate(zip(done.tolist(), ends.tolist(), strict=True)):
            newest = np.arange(start, end) >= end - bank.period
            tokens.append(texts[row][start:end])
            codes.append(np.where(newest, bank.codes(row, np.arange(start, end)), -1))
        bank.store(1, torch.cat(tokens), torch.from_numpy(np.concatenate(codes)))
        done, step = ends, step + 1

    for row, text in enumerate(texts):
        stored = bank.of(bank.ring_start(row, 0))[1]
        for head in range(num_heads):
            shift = head % group_size * stride // group_size
            ring = newest_of_a_head(len(text), num_queries, stride, shift)
            assert min(ring) >= 0
            expected = torch.tensor([rounded(text[offset, head]) for offset in ring])
            torch.testing.assert_close(stored[:, head], expected, rtol=1e-5, atol=1e-6)
    assert (bank.queries[0] == 77).all() and (bank.scales[0] == -1).all()  # the other layer


def test_one_example_by_hand():
    """Two heads a KV head, stride 4, two entries: the first keeps tokens 3, 7, 11, ..., the second 1, 5, 9, ..."""
    bank = bank_of(2, 1, 2, 4)
    assert bank.shifts.tolist() == [0, 2] == query_shifts(4, 2).tolist()
    assert bank.codes(0, np.arange(10)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert bank.codes(np.array([2, 1]), np.array([5, 9])).tolist() == [2 * 8 + 5, 8 + 1]
    # The numbers of token t, head h are all t + 100 h + 1; a scale in bfloat16 is off by 2^-8 of it at most.
    close = functools.partial(pytest.approx, rel=2**-8)
    query = torch.arange(1.0, 12.0)[:, None, None] + 100 * torch.arange(2.0)[:, None] + torch.zeros(HEAD_DIM)
    bank.store(0, query[:8], torch.from_numpy(bank.codes(1, np.arange(8))))
    start = bank.ring_start(1, 0)
    assert bank.of(start)[0, :, 0, 0].tolist() == close([4, 8])
    assert bank.of(start)[0, :, 1, 0].tolist() == close([102, 106])
    bank.store(0, query[8:], torch.from_numpy(bank.codes(1, np.arange(8, 11))))  # 8, 9, 10: only the second head's turn
    assert bank.of(start)[0, :, 0, 0].tolist() == close([4, 8])
    assert bank.of(start)[0, :, 1, 0].tolist() == close([110, 106])
    assert bank.of(bank.ring_start(1, 1))[0, :, 1, 0].tolist() == close([106, 110])


def test_rows_without_a_code_and_rows_of_others_stay():
    bank = bank_of(2, 2, 2, 2)
    query = torch.randn(3, 4, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    bank.store(1, query, torch.tensor([-1, -1, -1]))
    assert (bank.queries == 77).all() and (bank.scales == -1).all()
    bank.store(1, query[:2], torch.tensor([4 + 0, 4 + 1]))  # the first entry of row 1
    assert (bank.scales[1, 1, 0] > 0).all()
    assert (bank.scales[1, 1, 1] == -1).all() and (bank.scales[1, [0, 2]] == -1).all()
    assert (bank.queries[1, 1, 1] == 77).all() and (bank.queries[1, [0, 2]] == 77).all()


def test_a_float32_model_has_its_queries_kept_as_they_are():
    bank = QueryBank.allocate(1, 2, 2, 4, 2, 8, query_stride=1, dtype=torch.float32)
    query = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    bank.store(0, query, torch.tensor([2 + 0, 2 + 1]))
    assert torch.equal(bank.of(bank.ring_start(1, 0))[0], query) and (bank.of(0) == 0).all()
    assert bank.num_bytes == 2 * 2 * 4 * (4 * 8 + 2)


def test_reading_one_request_equals_reading_several():
    bank = bank_of(3, 2, 2, 1)
    codes = torch.randint(-7, 8, (*bank.scales.shape, HEAD_DIM), generator=torch.Generator().manual_seed(0))
    bank.queries.copy_(codes[..., : HEAD_DIM // 2] + 16 * codes[..., HEAD_DIM // 2 :])
    bank.scales.copy_(torch.rand(bank.scales.shape, generator=torch.Generator().manual_seed(1)))
    starts = bank.ring_start(2, 2), bank.ring_start(0, 1)
    several = bank.of(torch.tensor(starts))
    assert several.shape == (2, 2, 3, 4, HEAD_DIM) and several.dtype == torch.float32
    assert torch.equal(several[:, 0], bank.of(starts[0])) and torch.equal(several[:, 1], bank.of(starts[1]))
    for age, entry in enumerate([2, 0, 1]):
        for dim in (1, 5):
            code, scale = codes[1, 2, entry, 3, dim], bank.scales[1, 2, entry, 3]
            assert float(several[1, 0, age, 3, dim]) == pytest.approx(float(code) * float(scale), rel=1e-6)


def test_bytes():
    bank = QueryBank.allocate(2, 3, 4, 6, 2, 8, query_stride=4, dtype=torch.float16)
    assert bank.queries.dtype == torch.int8 and bank.scales.dtype == torch.bfloat16 and bank.head_dim == 8
    assert bank.num_bytes == 2 * 3 * 4 * 6 * (8 // 2 + 2)
    assert (bank.of(0) == 0).all()  # what vLLM's profiling run compresses by


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_the_error_is_at_most_half_a_step(dtype, size):
    vectors = (size * torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    numbers, scales = quantize(vectors)
    assert numbers.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert numbers.shape == (50, 4, 32) and scales.shape == (50, 4)
    stored, step = dequantize(numbers, scales), scales.float().unsqueeze(-1)
    error, largest = (stored - vectors.float()).abs(), vectors.float().abs().amax(dim=-1, keepdim=True)
    # A step is a seventh of the largest number but for bfloat16's rounding, by which that number may be off too: seven
    # steps are at most its 2^-8 from it. float32 rounds the quotient and the product.
    assert ((step * 7 / largest - 1).abs() <= 2**-8).all()
    assert (error <= torch.maximum(step / 2, largest * 2**-8) * (1 + 1e-4)).all()
    assert ((stored / step).round().abs().amax(dim=-1) == 7).all()  # all of the range is used, and -8 never


@pytest.mark.parametrize("head_dim", [2, 80, 96, 112, 128])
def test_every_pair_of_codes_survives_packing(head_dim):
    pairs = torch.cartesian_prod(*[torch.arange(-7.0, 8.0)] * 2)  # [225, 2]
    vectors = torch.zeros(225, head_dim)
    vectors[:, [0, head_dim // 2]] = pairs
    vectors[:, -1 if head_dim > 2 else 0] = 7.0  # so that the scale is 1
    numbers, scales = quantize(vectors)
    assert (scales == 1).all() and torch.equal(dequantize(numbers, scales), vectors)


def test_zeros_stay_zeros():
    numbers, scales = quantize(torch.zeros(2, 8))
    assert (numbers == 0).all() and (scales > 0).all()
    assert (dequantize(numbers, scales) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reference_scores_by_what_the_bank_holds(dtype):
    """Bit for bit, at the first event of a request and at the second."""
    config = KvConfig(window_size=32, buffer_size=16, query_stride=4, retention_ratio=0.5)
    geometry, num_prompt_tokens = Geometry.from_config(config, 16), 5
    assert geometry is not None
    bank = QueryBank.allocate(1, MAX_REQS, config.num_queries, 6, 2, HEAD_DIM, config.query_stride, dtype)
    cache, generator = LayerCache(config.query_span), torch.Generator().manual_seed(0)
    done = 0
    for event in (0, 1):
        end = geometry.event_at(num_prompt_tokens, event)
        query = torch.randn(end - done, 6, HEAD_DIM, generator=generator).to(dtype)
        cache.append(query, query[:, :2], query[:, :2])
        offsets = np.arange(done, end) - geometry.protected_len(num_prompt_tokens)
        newest = (offsets >= 0) & (offsets > offsets[-1] - bank.period)
        bank.store(0, query, torch.from_numpy(np.where(newest, bank.codes(2, offsets), -1)))
        done = end
        store = DenseStore(config, [cache])
        expected = store.queries(store.candidates([Due(0, 0, geometry, num_prompt_tokens, event)]))
        found = bank.of(bank.ring_start(2, oldest_entry(config, geometry, event)))
        assert torch.equal(found, expected) and expected.abs().amax() > 1
