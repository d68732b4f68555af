"""Reading and writing vLLM's CPU cache, whose keys are packed for the instruction set.

How an instruction set orders a block is nowhere documented, so it is measured: vLLM's own writer stores numbered
elements into a scratch block, and where each number lands is the order to read by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops as ops

_DIGIT = 256  # whole numbers up to here are exact in bfloat16 and float16


def split(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value parts of a layer's cache, as vLLM's CPU backend splits it.

    kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_dim]
    returns   two views [num_blocks, num_kv_heads, block_size, head_dim], keys packed
    """
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    keys, values = kv_cache.view(num_blocks, num_kv_heads, block_size * 2, -1).chunk(2, dim=2)
    return keys, values


def write(kv_cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor, isa: str) -> None:
    """Store keys and values [num_tokens, num_kv_heads, head_dim] at `slots` [num_tokens] (int64)."""
    key_cache, value_cache = split(kv_cache)
    ops.cpu_attn_reshape_and_cache(
        keys.contiguous(), values.contiguous(), key_cache, value_cache, slots, isa,
        k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip


class PackedReader:
    """Reads whole blocks of a layer's cache back into text order."""

    def __init__(self, kv_cache: Tensor, isa: str) -> None:
        """Measure the packing of caches shaped like `kv_cache`; RuntimeError if it is no permutation."""
        _, num_kv_heads, block_size, double = kv_cache.shape
        self.block_size, self.head_dim = block_size, double // 2
        size = block_size * self.head_dim
        numbers = torch.arange(size)
        found_keys, found_values = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        for weight in (1, _DIGIT, _DIGIT**2):
            digit = (numbers // weight % _DIGIT).view(block_size, 1, self.head_dim)
            tokens = digit.expand(-1, num_kv_heads, -1).to(kv_cache.dtype)
            scratch = torch.zeros_like(kv_cache[:1])
            write(scratch, tokens, tokens, torch.arange(block_size), isa)
            keys, values = split(scratch)
            found_keys += keys[0, 0].reshape(-1).to(torch.int64) * weight
            found_values += values[0, 0].reshape(-1).to(torch.int64) * weight
        if not (torch.equal(found_keys.sort().values, numbers) and torch.equal(found_values.sort().values, numbers)):
            raise RuntimeError(f"KvLLM cannot read the CPU cache of instruction set {isa!r} with {kv_cache.dtype}.")
        self._key_order, self._value_order = found_keys.argsort(), found_values.argsort()

    def read(self, kv_cache: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [len(block_ids) * block_size, num_kv_heads, head_dim] of whole blocks, in text order."""
        keys, values = split(kv_cache)
        return self._unpack(keys[block_ids], self._key_order), self._unpack(values[block_ids], self._value_order)

    def _unpack(self, blocks: Tensor, order: Tensor) -> Tensor:
        num_blocks, num_kv_heads = blocks.shape[:2]
        flat = blocks.reshape(num_blocks, num_kv_heads, -1)[..., order]
        tokens = flat.view(num_blocks, num_kv_heads, self.block_size, self.head_dim)
        return tokens.transpose(1, 2).reshape(-1, num_kv_heads, self.head_dim)
