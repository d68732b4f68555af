"""Reads and writes vLLM's CPU cache, whose keys are packed for the instruction set.

The order of elements within a block is not documented, so it is measured: vLLM's own writer stores numbered elements
into a scratch block, and where each number ends up gives the order for reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm import _custom_ops as ops

_DIGIT = 256  # integers up to here are exact in bfloat16 and float16


def split(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """The key and value parts of a layer's cache, split as in vLLM's CPU backend.

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
        """Measure the packing of caches shaped like `kv_cache`; RuntimeError if it is not a permutation."""
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
            raise RuntimeError(f"KvLLM cannot read vLLM's CPU cache for instruction set {isa!r} and {kv_cache.dtype}.")
        self._key_order, self._value_order = found_keys.argsort(), found_values.argsort()

    def read(self, kv_caches: Sequence[Tensor], block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks of each layer, in text order.

        block_ids: [num_blocks] int64, the same in all layers
        returns    two tensors [num_layers, num_blocks * block_size, num_kv_heads, head_dim], strided: heads come first
        """
        num_kv_heads, size = kv_caches[0].shape[1], len(self._key_order)
        # Each head's keys in each block are one row of the cache, and its values the next.
        rows = (torch.arange(num_kv_heads)[:, None] + block_ids * num_kv_heads).flatten() * 2
        read = []
        for places, order in ((rows, self._key_order), (rows + 1, self._value_order)):
            made = torch.empty(len(kv_caches), len(rows), size, dtype=kv_caches[0].dtype)
            for kv_cache, layer in zip(kv_caches, made, strict=True):
                torch.index_select(kv_cache.view(-1, size), 0, places, out=layer)
            in_order = self._in_text_order(made, order).reshape(len(kv_caches), num_kv_heads, -1, self.head_dim)
            read.append(in_order.transpose(1, 2))
        return read[0], read[1]

    def _in_text_order(self, rows: Tensor, order: Tensor) -> Tensor:
        """[..., block_size, head_dim], of rows [..., size] in which element `order[i]` is element i of the text."""
        plain = torch.arange(len(order)).view(self.block_size, self.head_dim)
        transposed = plain.view(self.head_dim, self.block_size).T
        # As vLLM stores values and keys without AMX. Looking every element up takes several times as long.
        if torch.equal(order, plain.flatten()):
            return rows.unflatten(-1, plain.shape)
        if torch.equal(order, transposed.flatten()):
            return rows.unflatten(-1, transposed.T.shape).transpose(-1, -2)
        return rows.index_select(-1, order).unflatten(-1, plain.shape)
