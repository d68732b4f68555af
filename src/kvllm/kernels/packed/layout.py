"""The layout of a packed block, which `pack` writes and attention reads.

A packed block replaces a plain block of `block_size` tokens. In each layer and KV head it has the same rows as the
plain block, each as wide as one token's elements. Keys and values have the same layout:

    code rows  16-bit words, [num_tokens, head_dim / 4]: nibble j of word w is the code of dimension j * head_dim/4 + w
    pair rows  pairs of bfloat16, a scale and a lowest value: per channel (keys) or per token (values)

A word holds dimensions that are a quarter of a head apart, so a kernel that shifts a tile of words gets whole tiles of
codes, without moving data between threads. A pair has 32 bits, the smallest unit that a kernel can prefetch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvllm.compression.rounding import Rounded, Rounding
from kvllm.kernels.paged import PagedCache
from kvllm.layout import ceil_div
from kvllm.support import PACKED_BITS

BITS = PACKED_BITS
CODES_PER_WORD = 4


@dataclass(frozen=True)
class PackedLayout:
    """num_tokens:     tokens in a packed block
    tokens_per_row: tokens whose codes fill one row of the cache
    pairs_per_row:  pairs of scale and lowest value that fill one row
    """

    num_tokens: int
    tokens_per_row: int
    pairs_per_row: int
    head_dim: int

    @classmethod
    def of(cls, cache: PagedCache, rounding: Rounding) -> PackedLayout:
        """Raises ValueError if the cache cannot hold such packed blocks."""
        row_bytes = cache.head_dim * cache.dtype.itemsize
        made = cls(rounding.block_tokens, 8 * cache.dtype.itemsize // BITS, row_bytes // 4, cache.head_dim)
        if rounding.bits != BITS or cache.head_dim % CODES_PER_WORD:
            raise ValueError(
                f"survivors of {rounding.bits} bits cannot be packed in a cache of {cache.dtype} with "
                f"head_dim={cache.head_dim}"
            )
        if made.code_rows + ceil_div(max(cache.head_dim, made.num_tokens), made.pairs_per_row) > cache.block_size:
            raise ValueError(f"{made} does not fit in a block of {cache.block_size} tokens")
        return made

    @property
    def code_rows(self) -> int:
        return ceil_div(self.num_tokens, self.tokens_per_row)

    @property
    def num_words(self) -> int:
        """Words of one token's codes."""
        return self.head_dim // CODES_PER_WORD


def as_words(layer: Tensor) -> Tensor:
    """Keys or values of a layer as 16-bit words, [num_blocks, block_size, num_kv_heads, any]."""
    return layer.view(torch.int16)


def _rows(paged: Tensor, blocks: Tensor, first: int, num_rows: int) -> Tensor:
    """Consecutive rows of these blocks, concatenated: [num_blocks, num_kv_heads, words]."""
    return paged[blocks, first : first + num_rows].transpose(1, 2).flatten(2)


def _put_rows(paged: Tensor, blocks: Tensor, first: int, words: Tensor) -> None:
    """Write `words`, [num_blocks, num_kv_heads, any], to the rows from `first` on."""
    width = paged.shape[-1]
    for start in range(0, words.shape[-1], width):
        part = words[..., start : start + width]
        paged[blocks, first + start // width, :, : part.shape[-1]] = part


def write_block_ref(paged: Tensor, blocks: Tensor, rounded: Rounded, layout: PackedLayout) -> None:
    """Write codes and scales of the keys, or the values, of packed blocks.

    paged:   from `as_words`
    blocks:  [batch], block ids
    rounded: codes [batch, num_tokens, num_kv_heads, head_dim], and their scales and lowest values
    """
    codes = rounded.codes.int().transpose(1, 2).unflatten(-1, (CODES_PER_WORD, layout.num_words))
    shifts = torch.arange(CODES_PER_WORD, device=codes.device)[:, None] * BITS
    words = (codes << shifts).sum(-2)  # [batch, num_kv_heads, num_tokens, num_words]
    _put_rows(paged, blocks, 0, words.to(torch.int16).flatten(2))
    pairs = torch.stack([t.transpose(1, 2).flatten(2).bfloat16() for t in (rounded.scale, rounded.lowest)], dim=-1)
    _put_rows(paged, blocks, layout.code_rows, pairs.flatten(2).view(torch.int16))


def read_block_ref(paged: Tensor, blocks: Tensor, layout: PackedLayout, by_channel: bool) -> Tensor:
    """Dequantize packed blocks, to [num_blocks, num_tokens, num_kv_heads, head_dim] float32.

    by_channel: scales are per channel (keys); otherwise per token (values)
    """
    words = _rows(paged, blocks, 0, layout.code_rows)[..., : layout.num_tokens * layout.num_words]
    words = words.unflatten(-1, (layout.num_tokens, 1, layout.num_words)).int()
    shifts = torch.arange(CODES_PER_WORD, device=words.device)[:, None] * BITS
    codes = ((words >> shifts) & (2**BITS - 1)).flatten(-2)  # [num_blocks, num_kv_heads, num_tokens, head_dim]
    num_pairs = layout.head_dim if by_channel else layout.num_tokens
    found = _rows(paged, blocks, layout.code_rows, ceil_div(num_pairs, layout.pairs_per_row))[..., : 2 * num_pairs]
    scale, lowest = found.contiguous().view(torch.bfloat16).float().unflatten(-1, (num_pairs, 2)).unbind(-1)
    dim = -2 if by_channel else -1
    return (codes * scale.unsqueeze(dim) + lowest.unsqueeze(dim)).transpose(1, 2)
