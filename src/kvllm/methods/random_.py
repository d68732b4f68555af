"""Random eviction (arXiv:2609.03430): with the prompt protected a serious rival, which every claim must beat."""

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
    """Keep tokens drawn uniformly, for each layer and KV head on its own.

    The draw is a hash of seed, layer, head and position in the text, so it is the same in every batch, after a resume
    and on every device.
    """

    seed: int = Field(0, description="Seed of the draws.")

    def score(self, window: Window) -> Tensor:
        heads = torch.arange(window.num_kv_heads, device=window.positions.device)
        state = mix(window.layers + mix_seed(self.seed))[:, None]
        state = mix(state + heads)[:, :, None]
        return (mix(state + window.positions) >> 8).float() / 2**24  # 24 bits: exact in float32


def mix(x: Tensor) -> Tensor:
    """Scatter integers over [0, 2**32): the hash `lowbias32` in int64, of which only the low 32 bits count."""
    x = x & _LOW32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW32
    return x ^ (x >> 16)


def mix_seed(seed: int) -> int:
    """The seed scattered too, so that neighbouring seeds do not share draws with neighbouring layers."""
    return int(mix(torch.tensor(seed & _LOW32)))
