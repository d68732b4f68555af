import pytest
import torch

from kvllm.kernels.window_scores import tile_sizes, window_scores, window_scores_ref
from kvllm.kernels.windows import gather_window_ref
from kvllm.methods.base import Window
from kvllm.methods.kara import Kara
from tests.kernels.paged_caches import random_blocks, random_cache


def assert_scores_close(actual, expected):
    # Rounding of the operands is the same on both sides; what is left is float32 against float64: sums of a few hundred
    # exponentials of logits up to about 5, each within a few units of 2^-24 (exp2 on the GPU: 2 ulp).
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-8)


def make(num_candidates, num_heads, num_kv_heads, head_dim, dtype, device, *, block_size=16, num_queries=5, **kwargs):
    """query_bank, req_slots, candidate_blocks, cache of 2 due requests; rows of other requests are NaN."""
    torch.manual_seed(1)
    blocks_each = num_candidates // block_size
    cache = random_cache(
        num_blocks=2 * blocks_each + 3,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=kwargs.pop("kv_dtype", dtype),
        device=device,
        **kwargs,
    )
    # One row of padding a layer, so that the bank's strides are its own.
    bank = torch.randn(cache.num_layers, 4, num_queries + 1, num_heads, head_dim, device=device).to(dtype)
    bank = bank[:, :, :num_queries]
    slots = torch.tensor([3, 1], device=device)
    bank[:, [0, 2]] = torch.nan
    return bank, slots, random_blocks(2, blocks_each, 2 * blocks_each + 3, device), cache


@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize(
    "num_candidates, num_heads, num_kv_heads, head_dim, dtype",
    [
        (64, 3, 3, 64, torch.bfloat16),
        (256, 32, 8, 128, torch.bfloat16),
        (48, 6, 3, 80, torch.float16),
        (96, 4, 2, 96, torch.bfloat16),
        (64, 2, 1, 256, torch.float16),
        (64, 9, 3, 64, torch.float32),
    ],
)
def test_window_scores(num_candidates, num_heads, num_kv_heads, head_dim, dtype, value_norm, device):
    bank, slots, blocks, cache = make(num_candidates, num_heads, num_kv_heads, head_dim, dtype, device)
    actual = window_scores(bank, slots, blocks, cache, value_norm)
    assert_scores_close(actual, window_scores_ref(bank, slots, blocks, cache, value_norm))


@pytest.mark.parametrize(
    "num_candidates, head_dim, dtype, block_size",
    [(544, 128, torch.bfloat16, 32), (160, 80, torch.float32, 16), (272, 256, torch.float16, 16)],
)
def test_candidates_of_several_tiles(num_candidates, head_dim, dtype, block_size, device):
    assert tile_sizes(num_candidates, 70, 256, dtype == torch.float32)[0] < num_candidates
    arguments = make(num_candidates, 14, 2, head_dim, dtype, device, block_size=block_size, num_queries=10)
    assert_scores_close(window_scores(*arguments), window_scores_ref(*arguments))


@pytest.mark.parametrize("num_candidates", [64, 320])
@pytest.mark.parametrize("token_major", [True, False])
def test_fp8_cache(num_candidates, token_major, device):
    arguments = make(
        *(num_candidates, 8, 2, 128, torch.bfloat16, device), kv_dtype=torch.float8_e4m3fn, token_major=token_major
    )
    # Every e4m3 value is a bf16 value, so dequantising adds no error.
    assert_scores_close(window_scores(*arguments), window_scores_ref(*arguments))


def test_large_logits_do_not_overflow(device):
    bank, slots, blocks, cache = make(64, 4, 2, 64, torch.bfloat16, device)
    scores = window_scores(bank * 100, slots, blocks, cache)
    # Logits in the hundreds lose as many digits after the point.
    torch.testing.assert_close(scores, window_scores_ref(bank * 100, slots, blocks, cache), rtol=1e-3, atol=1e-7)


def test_reference_is_kara(device):
    bank, slots, blocks, cache = make(64, 6, 3, 80, torch.float32, device)
    keys, values = gather_window_ref(blocks, cache, torch.float32)
    layers = torch.arange(cache.num_layers, device=device).repeat(2)
    queries = bank[:, slots].transpose(0, 1).flatten(0, 1)
    positions = torch.arange(64, device=device).expand(4, 3, 64)
    window = Window(queries, torch.arange(5, device=device), keys, values, positions, layers)
    expected = Kara().score(window).unflatten(0, (2, cache.num_layers))
    assert_scores_close(window_scores_ref(bank, slots, blocks, cache), expected)


def test_nothing_due(device):
    bank, slots, blocks, cache = make(64, 4, 2, 64, torch.bfloat16, device)
    assert window_scores(bank, slots[:0], blocks[:0], cache).shape == (0, 2, 2, 64)
