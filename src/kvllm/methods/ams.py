"""Adaptive mass segments (arXiv:2605.23200): each segment of the text gets a quota in proportion to its attention."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvllm.errors import UsageError
from kvllm.methods import register
from kvllm.methods.attention import observed_attention, pool
from kvllm.methods.base import Window
from kvllm.methods.bases import OnBase
from kvllm.options import BaseOptions, Count, KernelSize, Share, strict_dataclass


@register("ams")
@strict_dataclass
class AMS(OnBase):
    """Keep the best tokens by `base` of every segment, up to a quota in proportion to the segment's attention.

    Same: mass is the attention of the newest queries, pooled over 5 tokens and averaged over the query group, for each
    KV head; a segment ends once it has `segment_mass` and `min_segment` tokens, or `max_segment` tokens; each gets 8
    tokens, and the rest is distributed by mass.
    Differs: the rest is distributed by highest averages (D'Hondt), which adds up to exactly K without the paper's
    repair loops. The paper's credit carried over from earlier compressions is left out: methods have no state, and
    under the window policy, where each token is scored once, it would change nothing. The first 4 and newest 32
    tokens, which the paper keeps, are in the prompt and the buffer. The queries are the stored ones of the buffer, up
    to 32.
    """

    base: str = Field("rkv", description="Method that scores the tokens within a segment.")
    base_options: BaseOptions = Field(default_factory=dict)
    num_observed: Count = Field(32, description="Number of newest stored queries used to compute attention mass.")
    kernel_size: KernelSize = 5
    segment_mass: Share = Field(0.02, description="Share of the attention mass at which a segment ends.")
    min_segment: Count = Field(32, description="Minimum number of tokens in a segment.")
    max_segment: Count = Field(1024, description="Maximum number of tokens in a segment; at least `min_segment`.")
    min_quota: int = Field(8, ge=0, description="Minimum number of tokens that each segment keeps.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_segment < self.min_segment:
            raise UsageError(f"max_segment={self.max_segment}: must be at least min_segment={self.min_segment}.")

    def score(self, window: Window) -> Tensor:
        """Priority of each token, such that the K highest fill every segment's quota."""
        _, mean = observed_attention(window, self.num_observed)
        mass = pool(mean, self.kernel_size).mean(dim=2) + 1e-12
        mass = mass / mass.sum(dim=-1, keepdim=True)
        segment = cut_by_mass(mass, self.segment_mass, self.min_segment, self.max_segment)
        return slot_priority(self.scorer.score(window), mass, segment, self.min_quota)


def cut_by_mass(mass: Tensor, segment_mass: float, min_segment: int, max_segment: int) -> Tensor:
    """Segment index of each token.

    mass:    [batch, num_kv_heads, num_tokens]; each row sums to 1
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
        starts.scatter_(-1, start, 1)  # starts past the end go to the extra column
    return starts[..., :num_tokens].cumsum(dim=-1)


def slot_priority(scores: Tensor, mass: Tensor, segment: Tensor, min_quota: int) -> Tensor:
    """Priority of each token; the highest are kept.

    The `min_quota` best tokens of every segment come first (all best ones, then all second best, and so on), then the
    segments take turns in proportion to their mass. All tensors are [batch, num_kv_heads, num_tokens].
    """
    num_tokens = scores.shape[-1]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, segment.gather(-1, order).sort(dim=-1, stable=True).indices)  # by segment, best first
    first = torch.searchsorted(segment, segment)  # where each token's own segment begins
    rank = order.argsort(dim=-1) - first  # within its segment, from 0
    # float64, rounded at the end: scatter_add on a GPU sums in no fixed order.
    segment_mass = torch.zeros_like(mass, dtype=torch.float64).scatter_add(-1, segment, mass.double())
    turns = segment_mass.gather(-1, segment) / (rank - min_quota + 1).clamp(min=1)  # at most 1
    early = 1 + (num_tokens - rank) / num_tokens  # above 1
    return torch.where(rank < min_quota, early, turns).float()
