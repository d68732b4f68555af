"""Quantized formats of a whole KV cache, simulated: keys and values are rounded as if stored in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class CacheFormat(Protocol):
    """How a layer's cache stores every token, including the newest ones.

    exact_prefill: whether the prompt attends to its exact keys and values rather than to the stored ones
    """

    exact_prefill: ClassVar[bool]

    def round_trip(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values after storing and loading: [num_tokens, num_kv_heads, head_dim], in the same dtype."""

    def token_bytes(self, head_dim: int) -> float:
        """Bytes of one token's key and value in one KV head."""


@dataclass(frozen=True)
class Fp8:
    """E4M3 with a scale of 1: vLLM's `--kv-cache-dtype fp8` for a checkpoint without scales.

    Queries stay exact; some of vLLM's attention backends round them too.
    """

    exact_prefill: ClassVar[bool] = False

    def round_trip(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stored = (x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) for x in (keys, values))
        return next(stored), next(stored)

    def token_bytes(self, head_dim: int) -> float:
        return 2 * head_dim
