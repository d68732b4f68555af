"""Adaptive mass segments (arXiv:2605.23200): every stretch of the text keeps a share by the attention it draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.attention import observed_attention, pool
from kvllm.methods.base import Window
from kvllm.methods.bases import OnBase
from kvllm.methods.checks import check_between, check_count, check_kernel


@register("ams")
@dataclass(frozen=True)
class AMS(OnBase):
    """Cut the window where attention mass adds up, give each segment a quota, fill it by a base score.

    Same: mass is the newest queries' attention, pooled over 5 tokens, mean over the group, for each KV head; a segment
    ends once it holds `segment_mass` and `min_segment` tokens, or `max_segment`; 8 tokens each, the rest by mass.
    Differs: the rest is shared out by highest averages (D'Hondt), which hits K exactly without the paper's repair
    loops. The running credit over earlier compressions needs a state that a method does not have; under the window
    policy every token is judged once, so it would change nothing there. The first 4 and newest 32 tokens, which
    the paper keeps, lie in the prompt and the buffer. The queries are the buffer's stored ones, up to 32.

    base, base_options: the method that scores inside a segment
    """

    base: str = "rkv"
    base_options: Mapping[str, Any] = field(default_factory=dict)
    num_observed: int = 32
    kernel_size: int = 5
    segment_mass: float = 0.02
    min_segment: int = 32
    max_segment: int = 1024
    min_quota: int = 8

    def __post_init__(self) -> None:
        check_count("num_observed", self.num_observed)
        check_kernel("kernel_size", self.kernel_size)
        check_between("segment_mass", self.segment_mass, 0, 1)
        check_count("min_segment", self.min_segment)
        check_count("max_segment", self.max_segment, lowest=self.min_segment)
        check_count("min_quota", self.min_quota, lowest=0)
        _ = self.scorer  # refuses what it cannot build

    def score(self, window: Window) -> Tensor:
        """The order in which slots are given out, so that the K best fill every quota."""
        _, mean = observed_attention(window, self.num_observed)
        mass = pool(mean, self.kernel_size).mean(dim=2) + 1e-12
        mass = mass / mass.sum(dim=-1, keepdim=True)
        segment = cut_by_mass(mass, self.segment_mass, self.min_segment, self.max_segment)
        return slot_priority(self.scorer.score(window), mass, segment, self.min_quota)


def cut_by_mass(mass: Tensor, segment_mass: float, min_segment: int, max_segment: int) -> Tensor:
    """Number of the segment of each token, from 0.

    mass:    [batch, num_kv_heads, num_tokens], each row sums to 1
    returns  the same shape, int64
    """
    num_tokens = mass.shape[-1]
    total = mass.double().cumsum(dim=-1)
    starts = torch.zeros(*mass.shape[:-1], num_tokens + 1, dtype=torch.int64, device=mass.device)
    start = torch.zeros_like(starts[..., :1])
    for _ in range(num_tokens // min_segment):
        before = torch.where(start > 0, total.gather(-1, (start - 1).clamp(min=0)), 0.0)
        reached = torch.searchsorted(total, before + segment_mass) + 1  # one past the token that fills the segment
        start = torch.minimum(torch.maximum(reached, start + min_segment), start + max_segment).clamp(max=num_tokens)
        starts.scatter_(-1, start, 1)  # what lies past the end lands in the extra column
    return starts[..., :num_tokens].cumsum(dim=-1)


def slot_priority(scores: Tensor, mass: Tensor, segment: Tensor, min_quota: int) -> Tensor:
    """The larger, the sooner a token gets a slot.

    First each segment's best `min_quota` tokens, the best of all segments before the second best; after them segments
    take turns in proportion to their mass. All [batch, num_kv_heads, num_tokens].
    """
    num_tokens = scores.shape[-1]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, segment.gather(-1, order).sort(dim=-1, stable=True).indices)  # by segment, best first
    first = torch.searchsorted(segment, segment)  # where each token's own segment begins
    rank = order.argsort(dim=-1) - first  # in its segment, from 0
    # float64, rounded at the end: on a GPU scatter_add sums in any order.
    segment_mass = torch.zeros_like(mass, dtype=torch.float64).scatter_add(-1, segment, mass.double())
    turns = segment_mass.gather(-1, segment) / (rank - min_quota + 1).clamp(min=1)  # at most 1
    early = 1 + (num_tokens - rank) / num_tokens  # above 1
    return torch.where(rank < min_quota, early, turns).float()
