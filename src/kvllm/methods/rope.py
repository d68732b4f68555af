"""Rotary position embedding undone and applied again, for methods that ask what a key or query was before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvllm.errors import UsageError


@dataclass(frozen=True)
class Rope:
    """How a model's rotary position embedding turns its queries and keys.

    frequencies: [num_pairs] in float64, radians that a token turns each pair; dimensions past the pairs do not turn
    interleaved: pairs are (2 i, 2 i + 1), as in GPT-J; else (i, i + num_pairs), as in Llama and Qwen
    """

    frequencies: Tensor
    interleaved: bool = False

    def turn(self, distances: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Turn:
        """What turns vectors of `head_dim` dimensions by these distances.

        distances: [...], tokens; dtype: of the sines and cosines
        """
        num_pairs = len(self.frequencies)
        pairs = torch.arange(num_pairs, device=self.frequencies.device)
        rest = torch.arange(2 * num_pairs, head_dim, device=pairs.device).view(2, -1)
        first, second = (2 * pairs, 2 * pairs + 1) if self.interleaved else (pairs, pairs + num_pairs)
        first, second = torch.cat([first, rest[0]]), torch.cat([second, rest[1]])
        halves = not self.interleaved and not rest.numel()
        # float64: thousands of tokens ahead a float32 angle would be off by more than bfloat16 rounds.
        angles = distances.to(self.frequencies).unsqueeze(-1) * pad(self.frequencies, (0, rest.shape[1]))
        return Turn(angles.cos().to(dtype), angles.sin().to(dtype), first, second, halves)


@dataclass(frozen=True)
class Turn:
    """Turns dimensions in pairs, each by an angle.

    cos, sin: [..., head_dim / 2], of the angles
    first, second: [head_dim / 2], the dimensions that turn together; those that RoPE leaves alone come last, in any
                   pairs, with angles of 0
    halves:   whether these are all (i, i + head_dim / 2)
    """

    cos: Tensor
    sin: Tensor
    first: Tensor
    second: Tensor
    halves: bool

    def apply(self, vectors: Tensor) -> Tensor:
        """vectors: [..., head_dim], to which the angles broadcast; turned in their own dtype"""
        cos, sin = self.cos.to(vectors), self.sin.to(vectors)
        a, b = vectors[..., self.first], vectors[..., self.second]
        turned = torch.empty_like(vectors)
        turned[..., self.first] = a * cos - b * sin
        turned[..., self.second] = a * sin + b * cos
        return turned


def check_same_in_every_layer(config: Any, model: str) -> None:
    """Raise UsageError where a model's config says that some of its layers have no RoPE (SmolLM3, Llama 4)."""
    if not all(getattr(config, "no_rope_layers", None) or [1]):
        raise UsageError(
            f"KvLLM: some layers of {model} have no RoPE (no_rope_layers); use method_options lookahead=0, or another "
            "method."
        )


def frequencies(rope_theta: float, head_dim: int, device: torch.device | None = None) -> Tensor:
    """[head_dim / 2] in float64: radians a token turns each pair (plain RoPE, no scaling)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return float(rope_theta) ** -exponents


def unrotate(vectors: Tensor, places: Tensor, rope_theta: float) -> Tensor:
    """The vectors as they were before RoPE, in float32.

    vectors: [..., head_dim];  places: [...], place in the text
    """
    rope = Rope(frequencies(rope_theta, vectors.shape[-1], vectors.device))
    return rope.turn(-places, vectors.shape[-1]).apply(vectors.float())
