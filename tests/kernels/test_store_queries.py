import pytest
import torch

from kvllm.kernels.store_queries import store_queries, store_queries_ref


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens, num_heads, head_dim", [(1, 1, 64), (7, 32, 128), (5, 9, 80), (4, 20, 256)])
def test_store_queries(num_tokens, num_heads, head_dim, dtype, device):
    torch.manual_seed(0)
    max_num_reqs, num_queries = 3, 4
    # A slice of the projection of queries, keys and values together: rows are strided.
    qkv = torch.randn(num_tokens, (num_heads + 2) * head_dim, device=device).to(dtype)
    query = qkv[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
    slots = torch.randperm(max_num_reqs * num_queries)[: num_tokens + 2].int().to(device)
    slots[1::2] = -1
    bank = torch.full((max_num_reqs, num_queries, num_heads, head_dim), torch.nan, dtype=dtype, device=device)
    expected = bank.clone()

    store_queries(query, bank, slots)
    store_queries_ref(query, expected, slots)

    assert not expected.isnan().all()
    torch.testing.assert_close(bank, expected, rtol=0, atol=0, equal_nan=True)  # a copy: exact


def test_a_bank_of_another_dtype(device):
    query = torch.randn(3, 4, 64, device=device)
    if device == "cpu":  # the interpreter truncates where a GPU rounds
        query = query.bfloat16().float()
    slots = torch.tensor([5, -1, 0], dtype=torch.int32, device=device)
    bank = torch.full((2, 3, 4, 64), torch.nan, dtype=torch.bfloat16, device=device)
    expected = bank.clone()
    store_queries(query, bank, slots)
    store_queries_ref(query, expected, slots)
    torch.testing.assert_close(bank, expected, rtol=0, atol=0, equal_nan=True)


def test_quantised_queries(device):
    """With an fp8 cache vLLM may hand its backend fp8 queries; the bank holds them in the model's dtype."""
    query = torch.randn(3, 4, 64, device=device).to(torch.float8_e4m3fn)
    slots = torch.tensor([5, -1, 0], dtype=torch.int32, device=device)
    bank = torch.full((2, 3, 4, 64), torch.nan, dtype=torch.bfloat16, device=device)
    store_queries(query, bank, slots)
    torch.testing.assert_close(bank[1, 2].float(), query[0].float(), rtol=0, atol=0)
    torch.testing.assert_close(bank[0, 0].float(), query[2].float(), rtol=0, atol=0)
    assert bank.isnan().all(dim=(2, 3)).sum() == 4


def test_no_tokens(device):
    bank = torch.zeros(1, 2, 3, 16, device=device)
    store_queries(bank.new_empty(0, 3, 16), bank, torch.empty(0, dtype=torch.int32, device=device))
    assert not bank.any()
