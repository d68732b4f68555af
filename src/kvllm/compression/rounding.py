"""Survivors in few bits: they are rounded once, when their window is compressed.

A packed block has the bytes of a plain block of the KV cache and holds several times as many tokens. For each KV head:

    keys    codes [num_tokens, head_dim]; for each channel, a scale and a lowest value over the block's tokens
    values  codes [num_tokens, head_dim]; for each token, a scale and a lowest value over its channels

and each element is lowest + code * scale. Keys are rounded per channel because some channels of a model's keys are far
larger than the others (KIVI, arXiv:2402.02750): a scale shared with such a channel would round the others to zero.
The prompt and raw tokens, which get most of the attention, are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.support import PLAIN_BITS, is_fp8

SCALE_BYTES = 4  # a scale and a lowest value, bfloat16 each; with 8 bits each, blocks of 16 would still hold 56 tokens
TOKEN_STEP = 8  # a packed block holds a multiple of this


class Rounded(NamedTuple):
    """codes:         [batch, num_tokens, num_kv_heads, head_dim] uint8
    scale, lowest: bfloat16, 1 along the dimension that shares them: the tokens (keys) or the channels (values)
    """

    codes: Tensor
    scale: Tensor
    lowest: Tensor

    def restore(self) -> Tensor:
        """Dequantize, to float32."""
        return self.codes * self.scale.float() + self.lowest.float()


@dataclass(frozen=True)
class Rounding:
    """How survivors are rounded: to `bits` bits per element, in blocks of `block_tokens` tokens."""

    bits: int
    block_tokens: int

    @classmethod
    def from_config(
        cls, config: KvConfig, block_size: int, head_dim: int, cache_dtype: str = "auto"
    ) -> Rounding | None:
        """The rounding of `config`; None if survivors keep the cache's own precision.

        cache_dtype: as in `packed_block_tokens`
        Raises UsageError if a packed block would hold no more tokens than a plain one.
        """
        if config.survivor_bits == PLAIN_BITS:
            return None
        num_tokens = packed_block_tokens(block_size, head_dim, config.survivor_bits, cache_dtype)
        if num_tokens <= block_size:
            raise UsageError(
                f"survivor_bits={config.survivor_bits}: a block of {block_size} tokens with head_dim={head_dim} would "
                f"hold only {num_tokens} rounded tokens and their scales. Use a larger --block-size, or "
                "survivor_bits=16."
            )
        return cls(config.survivor_bits, num_tokens)

    def round(self, keys: Tensor, values: Tensor) -> tuple[list[Rounded], Rounded]:
        """Round survivors; returns the keys of each packed block, and the values of all tokens together.

        keys, values: [batch, num_tokens, num_kv_heads, head_dim], in text order
        """
        blocks = keys.split(self.block_tokens, dim=1)
        return [round_along(block, 1, self.bits) for block in blocks], round_along(values, -1, self.bits)

    def round_trip(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they are after packing and unpacking, in float32; shapes as in `round`."""
        key_blocks, rounded_values = self.round(keys, values)
        return torch.cat([block.restore() for block in key_blocks], dim=1), rounded_values.restore()


def packed_block_tokens(block_size: int, head_dim: int, bits: int, cache_dtype: str = "auto") -> int:
    """The number of tokens that a packed block holds in the bytes of a plain one of `block_size` tokens.

    cache_dtype: vLLM's --kv-cache-dtype; elements of plain blocks have 8 bits if it is fp8, else 16
    """
    plain = 2 * block_size * head_dim * (8 if is_fp8(cache_dtype) else PLAIN_BITS) // 8
    per_token = 2 * head_dim * bits // 8 + SCALE_BYTES
    return (plain - SCALE_BYTES * head_dim) // per_token // TOKEN_STEP * TOKEN_STEP


def round_along(x: Tensor, dim: int, bits: int) -> Rounded:
    """Round to 2**bits levels, evenly spaced between the smallest and the largest element along one dimension.

    x: any shape, finite
    """
    x = x.float()
    return encode(x, x.amin(dim, keepdim=True), x.amax(dim, keepdim=True), bits)


def encode(x: Tensor, lowest: Tensor, highest: Tensor, bits: int) -> Rounded:
    """Round to 2**bits levels, evenly spaced between two bounds; elements outside are clipped.

    x: float32; lowest, highest: float32, in shapes that broadcast to it
    """
    levels = 2**bits - 1
    # Scales are rounded to bfloat16 before the codes are chosen, so that the codes match the stored scales.
    stored = lowest.bfloat16()
    # Multiplied by the reciprocal, since division by a number is not the same on every device in PyTorch.
    scale = ((highest - stored.float()).clamp(min=0) * (1 / levels)).bfloat16()
    # The scale of a constant channel is 0, or underflows in bfloat16: every code then gives its lowest value.
    steps = (x - stored.float()) / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    return Rounded(steps.round().clamp(0, levels).to(torch.uint8), scale, stored)
