"""Paged caches with shuffled blocks and every unused byte poisoned."""

from __future__ import annotations

import torch
from torch import Tensor

from kvllm.kernels.paged import PagedCache


def random_cache(
    *,
    num_layers: int = 2,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    token_major: bool = False,
    seed: int = 0,
) -> PagedCache:
    """A cache as vLLM allocates it: keys and values of a head side by side, heads or tokens outermost in a block."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_blocks, num_kv_heads, block_size, 2 * head_dim)
    if token_major:
        shape = (num_blocks, block_size, num_kv_heads, 2 * head_dim)
    keys, values = [], []
    for _ in range(num_layers):
        kv = torch.randn(shape, generator=generator).to(dtype).to(device)
        kv = kv if token_major else kv.transpose(1, 2)
        key, value = kv.split(head_dim, dim=-1)
        keys.append(key)
        values.append(value)
    k_scale = v_scale = None
    if dtype == torch.float8_e4m3fn:
        # Powers of two, so that what is dequantised and quantised again needs no rounding, in which the interpreter
        # differs from a GPU.
        k_scale, v_scale = 2.0 ** torch.randint(-2, 2, (2, num_layers), generator=generator).to(device)
    return PagedCache.from_layers(keys, values, k_scale, v_scale)


def cache_dtype_of(dtype: torch.dtype) -> str:
    """vLLM's --kv-cache-dtype that makes caches of it."""
    return "fp8" if dtype == torch.float8_e4m3fn else "auto"


def copy_of(cache: PagedCache) -> PagedCache:
    """The same content at other addresses, with the same strides."""
    return PagedCache.from_layers(
        [_same_strides(t) for t in cache.keys], [_same_strides(t) for t in cache.values], cache.k_scale, cache.v_scale
    )


def _same_strides(t: Tensor) -> Tensor:
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    storage = torch.empty(size, dtype=t.dtype, device=t.device)
    clone = storage.as_strided(t.shape, t.stride())
    clone.view(torch.uint8).copy_(t.view(torch.uint8))
    return clone


def random_blocks(num_due: int, blocks_each: int, num_blocks: int, device: str, seed: int = 0) -> Tensor:
    """[num_due, blocks_each] int32: distinct blocks in no order."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
    return order[: num_due * blocks_each].view(num_due, blocks_each).int().to(device)


def assert_same_bits(actual: PagedCache, expected: PagedCache) -> None:
    """Every element of every layer, blocks of others included."""
    for layer in range(expected.num_layers):
        for a, e in zip(actual.raw(layer), expected.raw(layer), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)
