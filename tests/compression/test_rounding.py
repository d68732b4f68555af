"""Rounding of survivors: what fits in a packed block, how large the error can be, and what shares a scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvllm.compression.rounding import Rounded, Rounding, packed_block_tokens, round_along
from kvllm.config import KvConfig
from kvllm.errors import UsageError

HALF_ULP = 2.0**-8  # of bfloat16, relative


def tokens(num_tokens: int, head_dim: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, num_tokens, 3, head_dim], channels of different means and widths."""
    generator = torch.Generator().manual_seed(seed)
    mean, width = torch.randn(2, 3, head_dim, generator=generator) * torch.tensor([2.0, 1.0])[:, None, None]
    return (torch.randn(2, num_tokens, 3, head_dim, generator=generator) * width.exp() + mean).to(dtype)


def bytes_of_a_head(rounded: Rounded, bits: int) -> float:
    """Packed bytes of one batch member and one head."""
    batch, _, num_kv_heads, _ = rounded.codes.shape
    return (rounded.codes.numel() * bits / 8 + rounded.scale.nbytes + rounded.lowest.nbytes) / batch / num_kv_heads


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_a_packed_block_has_the_bytes_of_a_plain_one(block_size, head_dim, bits):
    plain = 2 * block_size * head_dim * 2
    num_tokens = packed_block_tokens(block_size, head_dim, bits)

    def packed_bytes(n: int) -> float:
        (keys,), values = Rounding(bits, n).round(tokens(n, head_dim), tokens(n, head_dim))
        return bytes_of_a_head(keys, bits) + bytes_of_a_head(values, bits)

    assert packed_bytes(num_tokens) <= plain < packed_bytes(num_tokens + 8)
    assert num_tokens % 8 == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_blocks_of_16_hold_56_tokens_in_4_bits_and_24_in_8(head_dim):
    assert packed_block_tokens(16, head_dim, 4) == 56
    assert packed_block_tokens(16, head_dim, 8) == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, -1], ids=["by channel", "by token"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_at_most_half_a_step_plus_the_rounding_of_the_scales(bits, dim, dtype):
    x = tokens(56, dtype=dtype)
    exact, rounded = x.double(), round_along(x, dim, bits)
    low, high = exact.amin(dim, keepdim=True), exact.amax(dim, keepdim=True)
    restored = rounded.codes.double() * rounded.scale.double() + rounded.lowest.double()
    error = (restored - exact).abs()
    low_error = low.abs() * HALF_ULP
    width = high - low + low_error
    step = width / (2**bits - 1) * (1 + HALF_ULP)
    # A scale that bfloat16 made smaller clips the largest numbers, a lowest value that it made larger the smallest.
    bound = torch.maximum(step / 2, width * HALF_ULP).maximum(low_error)
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 0.4 * step.min()
    assert rounded.scale.dtype == rounded.lowest.dtype == torch.bfloat16 and rounded.codes.dtype == torch.uint8
    assert rounded.codes.min() == 0 and rounded.codes.max() == 2**bits - 1
    torch.testing.assert_close(rounded.restore().double(), restored, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bfloat16_cache_keeps_its_smallest_numbers(bits):
    """Channels far from 0 and narrow, as biased keys have them: bfloat16 holds their lowest value exactly."""
    x = (tokens(56) + 200 * torch.arange(3)[:, None]).bfloat16()
    rounded = round_along(x, 1, bits)
    assert torch.equal(rounded.lowest, x.amin(1, keepdim=True))
    step = rounded.scale.float()
    assert ((rounded.restore() - x.float()).abs() <= step * max(0.5, HALF_ULP * 2**bits) + 1e-4).all()


@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, 0.1, -1000.3, 1e-30])
def test_constant_channels(value):
    x = torch.full((1, 56, 1, 4), value)
    rounded = round_along(x, 1, 4)
    assert torch.equal(rounded.restore().bfloat16(), x.bfloat16())


def test_an_outlier_channel_of_the_keys_costs_the_others_nothing():
    keys, values = tokens(56), tokens(56, seed=1)
    with_outlier = keys.clone()
    with_outlier[..., 7] *= 1000
    rounding = Rounding(4, 56)
    plain, _ = rounding.round_trip(keys, values)
    found, _ = rounding.round_trip(with_outlier, values)
    others = [c for c in range(64) if c != 7]
    assert torch.equal(found[..., others], plain[..., others])
    relative = (found[..., 7] - with_outlier[..., 7]).abs() / with_outlier[..., 7].abs().amax(1, keepdim=True)
    assert relative.max() < 0.07


def test_an_outlier_token_of_the_values_costs_the_others_nothing():
    keys, values = tokens(56), tokens(56, seed=1)
    with_outlier = values.clone()
    with_outlier[:, 5] *= 1000
    rounding = Rounding(4, 56)
    (_, plain), (_, found) = rounding.round_trip(keys, values), rounding.round_trip(keys, with_outlier)
    others = [t for t in range(56) if t != 5]
    assert torch.equal(found[:, others], plain[:, others]) and not torch.equal(found[:, 5], plain[:, 5])


def test_packed_blocks_of_keys_are_rounded_apart():
    keys, values = tokens(120), tokens(120, seed=1)
    blocks, rounded_values = Rounding(4, 56).round(keys, values)
    assert [block.codes.shape[1] for block in blocks] == [56, 56, 8]
    assert rounded_values.codes.shape == values.shape
    found, _ = Rounding(4, 56).round_trip(keys, values)
    for start in (0, 56, 112):
        own = slice(start, start + 56)
        alone, _ = Rounding(4, 56).round_trip(keys[:, own], values[:, own])
        assert torch.equal(found[:, own], alone)
    assert not torch.equal(found, Rounding(4, 120).round_trip(keys, values)[0])


@pytest.mark.parametrize("num_tokens", [56, 120])
def test_rounding_twice_changes_nothing(num_tokens):
    """In 4 bits the smallest and the largest number get the first and the last code, so the same scales come back."""
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 2, num_tokens, 3, 64, generator=generator)
    rounding = Rounding(4, 56)
    once = rounding.round_trip(keys, values)
    for again, before in zip(rounding.round_trip(*once), once, strict=True):
        torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-5)


def test_the_rounding_of_a_config():
    assert Rounding.from_config(KvConfig(), 16, 128) is None
    assert Rounding.from_config(KvConfig(survivor_bits=4), 16, 128) == Rounding(4, 56)
    assert Rounding.from_config(KvConfig(survivor_bits=4), 32, 64) == Rounding(4, 112)
    assert Rounding.from_config(KvConfig(survivor_bits=8), 16, 128) == Rounding(8, 24)
    assert Rounding.from_config(KvConfig(survivor_bits=4), 16, 128, "fp8") == Rounding(4, 24)
    assert Rounding.from_config(KvConfig(survivor_bits=4), 32, 128, "fp8_e4m3") == Rounding(4, 56)


def test_blocks_too_small_to_pack_are_refused():
    message = "survivor_bits=8: a block of 8 tokens with head_dim=64 would hold only 8 rounded .*--block-size"
    with pytest.raises(UsageError, match=message):
        Rounding.from_config(KvConfig(survivor_bits=8), 8, 64)
