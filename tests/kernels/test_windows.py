import pytest
import torch

from kvllm.kernels.windows import gather_window, gather_window_ref, scatter_window, scatter_window_ref
from tests.kernels.paged_caches import assert_same_bits, copy_of, random_blocks, random_cache

CASES = [
    (16, 1, 64, torch.bfloat16, torch.bfloat16),
    (16, 3, 80, torch.float16, torch.float16),
    (32, 8, 96, torch.float32, torch.float32),
    (32, 3, 128, torch.float8_e4m3fn, torch.bfloat16),
    (16, 2, 256, torch.float8_e4m3fn, torch.float16),
    (32, 1, 512, torch.bfloat16, torch.bfloat16),
]


def make(block_size, num_kv_heads, head_dim, dtype, token_major, device):
    """A cache and the blocks of 2 due requests, 4 each."""
    cache = random_cache(
        num_blocks=11,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        token_major=token_major,
    )
    return cache, random_blocks(2, 4, 11, device)


@pytest.mark.parametrize("token_major", [True, False])
@pytest.mark.parametrize("block_size, num_kv_heads, head_dim, kv_dtype, dtype", CASES)
def test_gather_window(block_size, num_kv_heads, head_dim, kv_dtype, dtype, token_major, device):
    cache, blocks = make(block_size, num_kv_heads, head_dim, kv_dtype, token_major, device)
    actual, expected = gather_window(blocks, cache, dtype), gather_window_ref(blocks, cache, dtype)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == (4, 4 * block_size, num_kv_heads, head_dim)
        torch.testing.assert_close(a, e, rtol=0, atol=0)  # a copy, or one product in float32: exact


def test_gathered_tokens_equal_those_of_the_cache(device):
    """The reference against the meaning of a block table, token by token."""
    cache, blocks = make(16, 2, 64, torch.bfloat16, True, device)
    keys, values = gather_window_ref(blocks, cache, torch.float32)
    for due, layer, token in [(0, 0, 0), (1, 0, 17), (1, 1, 63)]:
        block = int(blocks[due, token // 16])
        torch.testing.assert_close(keys[due * 2 + layer, token], cache.keys[layer][block, token % 16].float())
        torch.testing.assert_close(values[due * 2 + layer, token], cache.values[layer][block, token % 16].float())


@pytest.mark.parametrize("num_kept_blocks", [1, 3])
@pytest.mark.parametrize("block_size, num_kv_heads, head_dim, kv_dtype, dtype", CASES)
def test_scatter_window(block_size, num_kv_heads, head_dim, kv_dtype, dtype, num_kept_blocks, device):
    torch.manual_seed(3)
    actual, blocks = make(block_size, num_kv_heads, head_dim, kv_dtype, False, device)
    expected = copy_of(actual)
    shape = (4, num_kept_blocks * block_size, num_kv_heads, head_dim)
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    if kv_dtype == torch.float8_e4m3fn:
        if device == "cpu":  # normal e4m3 values at any of the scales: the interpreter's rounding differs from a GPU's
            keys, values = (x.float().mul(4).round().div(4).clamp(-3.75, 3.75).to(dtype) for x in (keys, values))
        keys[0, 0, 0, :2] = torch.tensor([6e4, -6e4])  # saturates
    scatter_window(keys, values, blocks, actual)
    scatter_window_ref(keys, values, blocks, expected)
    assert_same_bits(actual, expected)
