"""Rotary position embedding undone and applied again, for methods that ask what a key or query was before it."""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(rope_theta: float, head_dim: int, device: torch.device | None = None) -> Tensor:
    """[head_dim / 2] in float64: radians a token turns each pair (plain RoPE, no scaling)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return float(rope_theta) ** -exponents


def turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2), the layout of Llama and Qwen.

    vectors: [..., head_dim];  cos, sin: [..., head_dim / 2], broadcast against the pairs
    """
    a, b = vectors.float().chunk(2, dim=-1)
    cos, sin = cos.float(), sin.float()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def unrotate(vectors: Tensor, places: Tensor, rope_theta: float) -> Tensor:
    """The vectors as they were before RoPE, in float32.

    vectors: [..., head_dim];  places: [...], place in the text
    """
    # float64: at place 100,000 a float32 angle is off by half a hundredth of a radian.
    angles = places.double().unsqueeze(-1) * frequencies(rope_theta, vectors.shape[-1], vectors.device)
    return turn(vectors, angles.cos(), -angles.sin())
