"""Rotary position embedding undone and applied again, for methods that ask what a key or query was before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvllm.errors import UsageError


@dataclass(frozen=True)
class Rope:
    """How rotary position embeddings rotate queries and keys.

    frequencies: [num_pairs], radians that a token rotates each pair, or [batch, num_pairs] where the members of a batch
                 differ, with zeros for those that have no rotary embedding; float64. Dimensions past the pairs are not
                 rotated
    interleaved: pairs are (2 i, 2 i + 1), as in GPT-J; else (i, i + num_pairs), as in Llama and Qwen
    """

    frequencies: Tensor
    interleaved: bool = False

    @classmethod
    def of_layers(cls, ropes: Sequence[Rope | None]) -> Rope | None:
        """One for a batch of layers; None where none of them has a rotary embedding.

        Raises ValueError where layers pair their dimensions differently.
        """
        distinct = [rope for rope in ropes if rope is not None]
        if not distinct:
            return None
        first = distinct[0]
        if any((rope.num_pairs, rope.interleaved) != (first.num_pairs, first.interleaved) for rope in distinct):
            raise ValueError("layers pair the dimensions that they rotate in different ways")
        if len(distinct) == len(ropes) and all(torch.equal(r.frequencies, first.frequencies) for r in distinct):
            return first
        still = torch.zeros_like(first.frequencies)
        return cls(torch.stack([still if r is None else r.frequencies for r in ropes]), first.interleaved)

    @property
    def num_pairs(self) -> int:
        return self.frequencies.shape[-1]

    def take(self, members: slice | Tensor) -> Rope:
        """That of some members of the batch, by slice or indices."""
        return self if self.frequencies.ndim == 1 else replace(self, frequencies=self.frequencies[members])

    def rotation(self, distances: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Rotation:
        """What rotates vectors of `head_dim` dimensions by these distances.

        distances: [...], tokens; dtype: of the sines and cosines
        """
        num_pairs = self.num_pairs
        pairs = torch.arange(num_pairs, device=self.frequencies.device)
        rest = torch.arange(2 * num_pairs, head_dim, device=pairs.device).view(2, -1)
        first, second = (2 * pairs, 2 * pairs + 1) if self.interleaved else (pairs, pairs + num_pairs)
        first, second = torch.cat([first, rest[0]]), torch.cat([second, rest[1]])
        halves = not self.interleaved and not rest.numel()
        frequencies = pad(self.frequencies, (0, rest.shape[1]))
        if frequencies.ndim == 2:
            frequencies = frequencies.unflatten(0, (-1, *[1] * distances.ndim))
        # float64: thousands of tokens ahead a float32 angle would be off by more than bfloat16 rounds.
        angles = distances.to(frequencies).unsqueeze(-1) * frequencies
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), first, second, halves)

    def undo(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """The vectors as they were before the rotation, in float32.

        vectors: [..., head_dim];  positions: [...], in the text
        """
        return self.rotation(-positions, vectors.shape[-1]).apply(vectors.float())


@dataclass(frozen=True)
class Rotation:
    """Rotates dimensions in pairs, each by an angle.

    cos, sin: [..., head_dim / 2], of the angles; the first axis is the batch where its members have their own
              frequencies
    first, second: [head_dim / 2], the dimensions that are rotated together; those that RoPE leaves alone come last, in
                   any pairs, with angles of 0
    halves:   whether these are all (i, i + head_dim / 2)
    """

    cos: Tensor
    sin: Tensor
    first: Tensor
    second: Tensor
    halves: bool

    def apply(self, vectors: Tensor) -> Tensor:
        """vectors: [..., head_dim], to which the angles broadcast; rotated in their own dtype"""
        cos, sin = self.cos.to(vectors), self.sin.to(vectors)
        if self.halves:
            a, b = vectors.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        a, b = vectors[..., self.first], vectors[..., self.second]
        rotated = torch.empty_like(vectors)
        rotated[..., self.first] = a * cos - b * sin
        rotated[..., self.second] = a * sin + b * cos
        return rotated


def frequencies(rope_theta: float, head_dim: int, device: torch.device | None = None) -> Tensor:
    """[head_dim / 2] in float64: radians that a token rotates each pair (plain RoPE, no scaling)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return float(rope_theta) ** -exponents


def check_plain(rope: Rope | None, rope_theta: float) -> None:
    """Raise UsageError unless the model rotates all dimensions of every layer by plain RoPE with this base."""
    if rope is None:
        raise UsageError(f"rope_theta={rope_theta}: the model has no rotary embedding; leave it out.")
    expected = frequencies(rope_theta, 2 * rope.num_pairs, rope.frequencies.device)
    # A model's own are computed in float32.
    same = rope.frequencies.ndim == 1 and torch.allclose(rope.frequencies, expected, rtol=1e-4, atol=0)
    if rope.interleaved or not same:
        raise UsageError(
            f"rope_theta={rope_theta}: the model's rotary embedding is another one (another base, scaled, interleaved, "
            "or not the same in every layer); leave it out, or give the model's own base."
        )


def unrotate(vectors: Tensor, positions: Tensor, rope_theta: float) -> Tensor:
    """The vectors as they were before RoPE, in float32.

    vectors: [..., head_dim];  positions: [...], in the text
    """
    return Rope(frequencies(rope_theta, vectors.shape[-1], vectors.device)).undo(vectors, positions)
