import numpy as np
import pytest
import torch

from kvllm.compression.query_bank import QueryBank
from kvllm.kernels.store_tokens import NewPairs, store_tokens, store_tokens_ref
from tests.kernels.paged_caches import assert_same_bits, copy_of, random_cache


def bank_of(num_heads, num_kv_heads, head_dim, stride, device, dtype=torch.bfloat16):
    bank = QueryBank.allocate(2, 3, 4, num_heads, num_kv_heads, head_dim, stride, dtype, device)
    bank.queries.fill_(77)
    bank.scales.fill_(-1.0)
    return bank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "num_tokens, num_heads, num_kv_heads, head_dim, stride",
    [(1, 1, 1, 64, 1), (7, 32, 8, 128, 4), (5, 9, 3, 80, 4), (4, 20, 4, 256, 2), (9, 12, 2, 16, 8), (2, 8, 1, 512, 4)],
)
def test_queries(num_tokens, num_heads, num_kv_heads, head_dim, stride, dtype, device):
    torch.manual_seed(0)
    # A slice of the projection of queries, keys and values together: rows are strided.
    qkv = torch.randn(num_tokens, (num_heads + 2) * head_dim, device=device).to(dtype)
    query = qkv[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
    bank = bank_of(num_heads, num_kv_heads, head_dim, stride, device, dtype)
    expected = bank_of(num_heads, num_kv_heads, head_dim, stride, device, dtype)
    rows, offsets = np.arange(num_tokens) % 3, 5 + np.arange(num_tokens) * 7
    codes = torch.from_numpy(bank.codes(rows, offsets)).int().to(device)
    codes[2::3] = -1
    codes = torch.cat([codes, codes])  # padded

    store_tokens(query, bank, 1, codes)
    store_tokens_ref(query, expected, 1, codes)

    assert (expected.scales[1] > 0).any()
    assert torch.equal(bank.queries, expected.queries) and torch.equal(bank.scales, expected.scales)
    assert (bank.scales[0] == -1).all() and (bank.queries[0] == 77).all()


def test_halves_are_rounded_to_even(device):
    first, second = [7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -6.5, 0.0], [-7.0, -2.5, 6.5, 0.0, 3.4, 3.6, -7.0, 1.0]
    query = torch.tensor(first + second, device=device).view(1, 1, 16)
    bank = bank_of(1, 1, 16, 1, device)
    store_tokens(query, bank, 0, torch.zeros(1, dtype=torch.int32, device=device))
    first, second = [7, 0, 2, 2, 0, -2, -6, 0], [-7, -2, 6, 0, 3, 4, -7, 1]
    assert bank.queries[0, 0, 0, 0].tolist() == [a + 16 * b for a, b in zip(first, second, strict=True)]
    assert bank.scales[0, 0, 0, 0] == 1
    assert bank.of(0)[0, 0, 0].tolist() == first + second


def test_quantised_queries(device):
    """With an fp8 cache vLLM may hand its backend fp8 queries."""
    query = torch.randn(1, 4, 64, device=device).to(torch.float8_e4m3fn)
    bank = bank_of(4, 4, 64, 1, device)
    store_tokens(query, bank, 0, torch.zeros(1, dtype=torch.int32, device=device))
    error = (bank.of(0)[0, 0] - query[0].float()).abs() / query[0].float().abs().amax(dim=-1, keepdim=True)
    # Half a step, and for a code of 7 what the scale is off by in bfloat16.
    assert error.max() < 0.5 / 7 + 2**-8


def test_no_tokens(device):
    bank = bank_of(3, 1, 16, 1, device)
    store_tokens(torch.empty(0, 3, 16, device=device), bank, 0, torch.empty(0, dtype=torch.int32, device=device))
    assert (bank.scales == -1).all()


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "num_tokens, num_heads, num_kv_heads, head_dim, block_size",
    [
        (1, 2, 1, 64, 16),
        (7, 32, 8, 128, 16),
        (5, 9, 3, 80, 8),
        (6, 24, 12, 64, 32),
        (4, 20, 4, 256, 16),
        (3, 8, 1, 512, 32),
    ],
)
def test_keys_and_values(num_tokens, num_heads, num_kv_heads, head_dim, block_size, cache_dtype, device):
    """Into slots of any order; padded tokens, tokens without a slot, other layers and other slots stay as they are."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if cache_dtype == torch.float16 else cache_dtype  # one that has to be converted, too
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    query, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cache = random_cache(
        num_blocks=3, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=cache_dtype,
        device=device,
    )  # fmt: skip
    expected_cache = copy_of(cache)
    bank = bank_of(num_heads, num_kv_heads, head_dim, 1, device, dtype)
    expected = bank_of(num_heads, num_kv_heads, head_dim, 1, device, dtype)
    codes = torch.from_numpy(bank.codes(np.arange(num_tokens) % 3, np.arange(num_tokens))).int().to(device)
    slot_mapping = torch.randperm(3 * block_size)[: max(num_tokens - 1, 1)].to(device)
    slot_mapping[2::3] = -1

    store_tokens(query, bank, 1, codes, NewPairs(key, value, cache, slot_mapping))
    store_tokens_ref(query, expected, 1, codes, NewPairs(key, value, expected_cache, slot_mapping))

    where = divmod(int(slot_mapping[0]), block_size)
    assert torch.equal(expected_cache.keys[1][where], key[0].to(cache_dtype))
    assert torch.equal(expected_cache.values[1][where], value[0].to(cache_dtype))
    assert_same_bits(cache, expected_cache)
    assert torch.equal(bank.queries, expected.queries) and torch.equal(bank.scales, expected.scales)
