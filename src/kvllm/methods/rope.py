"""Rotary position embedding undone and applied again, for methods that ask what a key or query was before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """How a model's rotary position embedding turns its queries and keys.

    frequencies: [num_pairs] in float64, radians that a token turns each pair; dimensions past the pairs do not turn
    interleaved: pairs are (2 i, 2 i + 1), as in GPT-J; else (i, i + num_pairs), as in Llama and Qwen
    """

    frequencies: Tensor
    interleaved: bool = False

    def tables(self, distances: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """What turns vectors by these distances: `vectors * cos + vectors[..., partner] * sin`.

        distances: [...], tokens; head_dim: dimensions of a vector
        returns cos and sin [..., head_dim] in float32, and partner [head_dim] (int64), the other one of each pair
        """
        num_pairs = len(self.frequencies)
        first = torch.arange(num_pairs, device=self.frequencies.device)
        first, second = (2 * first, 2 * first + 1) if self.interleaved else (first, first + num_pairs)
        # float64: thousands of tokens ahead a float32 angle would be off by more than bfloat16 rounds.
        angles = distances.to(self.frequencies).unsqueeze(-1) * self.frequencies
        cos = torch.ones(*distances.shape, head_dim, device=angles.device)
        sin = torch.zeros_like(cos)
        cos[..., first] = cos[..., second] = angles.cos().float()
        sin[..., second] = angles.sin().float()
        sin[..., first] = -sin[..., second]
        partner = torch.arange(head_dim, device=angles.device)
        partner[first], partner[second] = second, first
        return cos, sin, partner


def check_same_in_every_layer(config: Any, model: str) -> None:
    """Raise ValueError where a model's config says that some of its layers have no RoPE (SmolLM3, Llama 4)."""
    if not all(getattr(config, "no_rope_layers", None) or [1]):
        raise ValueError(
            f"KvLLM: some layers of {model} have no RoPE (no_rope_layers); use method_options lookahead=0, or another "
            "method."
        )


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
