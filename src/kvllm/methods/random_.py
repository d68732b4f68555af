"""Random eviction (arXiv:2609.03430): with a protected prompt, a strong baseline for every other method."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass

_LOW32 = 0xFFFFFFFF


@register("random")
@strict_dataclass
class Random(Method):
    """Keep a uniform random sample of tokens, drawn separately for each layer and KV head.

    Each token's random number is a hash of seed, layer, head and text position, so the sample is the same in every
    batch, after preemption and on every device.
    """

    seed: int = Field(0, description="Random seed.")

    def score(self, window: Window) -> Tensor:
        heads = torch.arange(window.num_kv_heads, device=window.positions.device)
        state = mix(window.layers + mix_seed(self.seed))[:, None]
        state = mix(state + heads)[:, :, None]
        return (mix(state + window.positions) >> 8).float() / 2**24  # 24 bits: exact in float32


def mix(x: Tensor) -> Tensor:
    """Hash integers to [0, 2**32): `lowbias32`, computed in int64 on the low 32 bits."""
    x = x & _LOW32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW32
    return x ^ (x >> 16)


def mix_seed(seed: int) -> int:
    """Hash the seed, so that consecutive seeds do not repeat the samples of neighbouring layers."""
    return int(mix(torch.tensor(seed & _LOW32)))
