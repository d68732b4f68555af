"""The query bank against rings that are written one token and one head at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvllm.compression.query_bank import QueryBank, dequantize, quantize
from kvllm.compression.query_ring import query_shifts

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
    """A vector in whole steps of a 127th of its largest number, in Python floats."""
    step = max(abs(float(x)) for x in vector) / 127
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
def test_chunks_leave_what_token_after_token_would(num_kv_heads, group_size, stride, num_queries, sizes):
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


def test_one_by_hand():
    """Two heads a KV head, stride 4, two entries: the first keeps tokens 3, 7, 11, ..., the second 1, 5, 9, ..."""
    bank = bank_of(2, 1, 2, 4)
    assert bank.shifts.tolist() == [0, 2] == query_shifts(4, 2).tolist()
    assert bank.codes(0, np.arange(10)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert bank.codes(np.array([2, 1]), np.array([5, 9])).tolist() == [2 * 8 + 5, 8 + 1]
    # The numbers of token t, head h are all t + 100 h + 1.
    query = torch.arange(1.0, 12.0)[:, None, None] + 100 * torch.arange(2.0)[:, None] + torch.zeros(HEAD_DIM)
    bank.store(0, query[:8], torch.from_numpy(bank.codes(1, np.arange(8))))
    start = bank.ring_start(1, 0)
    assert bank.of(start)[0, :, 0, 0].tolist() == pytest.approx([4, 8])
    assert bank.of(start)[0, :, 1, 0].tolist() == pytest.approx([102, 106])
    bank.store(0, query[8:], torch.from_numpy(bank.codes(1, np.arange(8, 11))))  # 8, 9, 10: only the second head's turn
    assert bank.of(start)[0, :, 0, 0].tolist() == pytest.approx([4, 8])
    assert bank.of(start)[0, :, 1, 0].tolist() == pytest.approx([110, 106])
    assert bank.of(bank.ring_start(1, 1))[0, :, 1, 0].tolist() == pytest.approx([106, 110])


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
    assert bank.num_bytes == 2 * 2 * 4 * (4 * 8 + 4)


def test_of_one_request_or_several():
    bank = bank_of(3, 2, 2, 1)
    bank.queries.copy_(torch.randint(-127, 128, bank.queries.shape, generator=torch.Generator().manual_seed(0)))
    bank.scales.copy_(torch.rand(bank.scales.shape, generator=torch.Generator().manual_seed(1)))
    starts = bank.ring_start(2, 2), bank.ring_start(0, 1)
    several = bank.of(torch.tensor(starts))
    assert several.shape == (2, 2, 3, 4, HEAD_DIM) and several.dtype == torch.float32
    assert torch.equal(several[:, 0], bank.of(starts[0])) and torch.equal(several[:, 1], bank.of(starts[1]))
    for age, entry in enumerate([2, 0, 1]):
        number, scale = bank.queries[1, 2, entry, 3, 4], bank.scales[1, 2, entry, 3]
        assert float(several[1, 0, age, 3, 4]) == pytest.approx(float(number) * float(scale), rel=1e-6)


def test_bytes():
    bank = QueryBank.allocate(2, 3, 4, 6, 2, 8, query_stride=4, dtype=torch.float16)
    assert bank.queries.dtype == torch.int8 and bank.scales.dtype == torch.float32
    assert bank.num_bytes == 2 * 3 * 4 * 6 * (8 + 4)
    assert (bank.of(0) == 0).all()  # what vLLM's profiling run compresses by


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_a_number_is_off_by_half_a_step_at_most(dtype, size):
    vectors = (size * torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    numbers, scales = quantize(vectors)
    assert numbers.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (50, 4)
    largest = vectors.float().abs().amax(dim=-1, keepdim=True)
    error = (dequantize(numbers, scales) - vectors.float()).abs()
    assert (error <= largest / 127 / 2 * (1 + 1e-4)).all()  # float32 rounds the quotient and the product
    assert (numbers.abs().amax(dim=-1) == 127).all()  # all of the range is used, and -128 never


def test_zeros_stay_zeros():
    numbers, scales = quantize(torch.zeros(2, 8))
    assert (numbers == 0).all() and (scales > 0).all()
    assert (dequantize(numbers, scales) == 0).all()
