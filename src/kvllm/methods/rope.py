"""Rotary position embeddings: rotate keys and queries, or undo their rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvllm.errors import UsageError


@dataclass(frozen=True)
class Rope:
    """A model's rotary position embedding.

    frequencies: [num_pairs] in float64, radians per token of each pair; [batch, num_pairs] if batch members differ,
                 with zeros for those without a rotary embedding. Dimensions beyond the pairs are not rotated
    interleaved: pairs are (2 i, 2 i + 1), as in GPT-J; else (i, i + num_pairs), as in Llama and Qwen
    """

    frequencies: Tensor
    interleaved: bool = False

    @classmethod
    def of_layers(cls, ropes: Sequence[Rope | None]) -> Rope | None:
        """Combine the embeddings of a batch of layers; None if no layer has one.

        Raises ValueError if the layers pair their dimensions differently.
        """
        distinct = [rope for rope in ropes if rope is not None]
        if not distinct:
            return None
        first = distinct[0]
        if any((rope.num_pairs, rope.interleaved) != (first.num_pairs, first.interleaved) for rope in distinct):
            raise ValueError("the layers pair the dimensions of their rotary embeddings differently")
        if len(distinct) == len(ropes) and all(torch.equal(r.frequencies, first.frequencies) for r in distinct):
            return first
        still = torch.zeros_like(first.frequencies)
        return cls(torch.stack([still if r is None else r.frequencies for r in ropes]), first.interleaved)

    @property
    def num_pairs(self) -> int:
        return self.frequencies.shape[-1]

    def take(self, members: slice | Tensor) -> Rope:
        """The embedding of some members of the batch."""
        return self if self.frequencies.ndim == 1 else replace(self, frequencies=self.frequencies[members])

    def rotation(self, distances: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Rotation:
        """The rotation of vectors of `head_dim` dimensions by these distances.

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
        # float64: at thousands of tokens, the error of a float32 angle exceeds bfloat16 rounding.
        angles = distances.to(frequencies).unsqueeze(-1) * frequencies
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), first, second, halves)

    def undo(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Undo the rotation of vectors at these positions; returns float32.

        vectors: [..., head_dim];  positions: [...], in the text
        """
        return self.rotation(-positions, vectors.shape[-1]).apply(vectors.float())


@dataclass(frozen=True)
class Rotation:
    """Rotates pairs of dimensions by angles.

    cos, sin: [..., head_dim / 2], of the angles; the first axis is the batch if its members' frequencies differ
    first, second: [head_dim / 2], the two dimensions of each pair; dimensions that RoPE does not rotate come last, in
                   arbitrary pairs, with angle 0
    halves:   whether all pairs are (i, i + head_dim / 2)
    """

    cos: Tensor
    sin: Tensor
    first: Tensor
    second: Tensor
    halves: bool

    def apply(self, vectors: Tensor) -> Tensor:
        """Rotate vectors [..., head_dim], to which the angles broadcast, in their own dtype."""
        cos, sin = self.cos.to(vectors), self.sin.to(vectors)
        if self.halves:
            rotated, across = (vectors * torch.cat([each, each], dim=-1) for each in (cos, sin))
            # Not addcmul_, whose rounding depends on where an element is in memory, so on the rest of the batch.
            half = vectors.shape[-1] // 2
            rotated[..., :half] -= across[..., half:]
            rotated[..., half:] += across[..., :half]
            return rotated
        a, b = vectors[..., self.first], vectors[..., self.second]
        rotated = torch.empty_like(vectors)
        rotated[..., self.first] = a * cos - b * sin
        rotated[..., self.second] = a * sin + b * cos
        return rotated


def frequencies(rope_theta: float, head_dim: int, device: torch.device | None = None) -> Tensor:
    """[head_dim / 2] in float64: radians per token of each pair (plain RoPE, no scaling)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return float(rope_theta) ** -exponents


def check_plain(rope: Rope | None, rope_theta: float) -> None:
    """Raise UsageError unless all layers use plain RoPE with this base on all dimensions."""
    if rope is None:
        raise UsageError(f"rope_theta={rope_theta}: the model has no rotary embedding; leave it out.")
    expected = frequencies(rope_theta, 2 * rope.num_pairs, rope.frequencies.device)
    # The tolerance is for models that compute their frequencies in float32.
    same = rope.frequencies.ndim == 1 and torch.allclose(rope.frequencies, expected, rtol=1e-4, atol=0)
    if rope.interleaved or not same:
        raise UsageError(
            f"rope_theta={rope_theta}: the model's rotary embedding differs (another base, scaled, interleaved, or not "
            "the same in every layer); leave it out, or give the model's own base."
        )


def unrotate(vectors: Tensor, positions: Tensor, rope_theta: float) -> Tensor:
    """Undo plain RoPE; returns float32.

    vectors: [..., head_dim];  positions: [...], in the text
    """
    return Rope(frequencies(rope_theta, vectors.shape[-1], vectors.device)).undo(vectors, positions)
