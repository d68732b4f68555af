"""DefensiveKV (github.com/FFY0/DefensiveKV): guard against the worst case instead of the mean."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.attention import observed_attention, pool
from kvllm.methods.base import Method, Window
from kvllm.options import Count, KernelSize, Share, strict_dataclass


@register("defensivekv")
@strict_dataclass
class DefensiveKV(Method):
    """Keep the tokens that carry most of the mean attention, then those that any query or head might need.

    Same: first the tokens within `first_mass` of the mean attention; then the maximum over the heads of a query group
    and over the queries, of weights pooled over 5 tokens that keep their row's mass; never below the head's mean; times
    the size of what the token brings.
    Differs: that size is the L1 norm of the value, not of W_o v, which no method sees here. Each head keeps the same
    number, since the paged cache has one length for all (the paper moves budget between heads). The queries are
    the buffer's stored ones, up to 32, and the buffer, which is always kept, has no share in the softmax, so the
    paper's correction of `first_mass` for it falls away.
    """

    num_observed: Count = Field(32, description="Number of newest stored queries that are used.")
    kernel_size: KernelSize = 5
    first_mass: Share = Field(0.9, description="Share of the mean attention whose tokens are kept before all others.")

    def score(self, window: Window) -> Tensor:
        weights, mean = observed_attention(window, self.num_observed)
        mean = mean.mean(dim=2)  # over the group: [batch, num_kv_heads, num_tokens]
        pooled = pool(weights, self.kernel_size)
        pooled = pooled / pooled.sum(dim=-1, keepdim=True).clamp(min=1e-30) * weights.sum(dim=-1, keepdim=True)
        worst = pooled.amax(dim=(2, 3))
        worst = worst.maximum(worst.mean(dim=-1, keepdim=True))
        needed = worst * window.values.float().norm(p=1, dim=-1).transpose(1, 2)
        needed = needed / needed.amax(dim=-1, keepdim=True).clamp(min=1e-30)  # in [0, 1]
        return torch.where(carries_mass(mean, self.first_mass), 1 + mean, needed)


def carries_mass(weights: Tensor, share: float) -> Tensor:
    """Which of the largest entries of a row together stay below `share` of its sum; same shape, bool."""
    ordered = (weights / weights.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter(
        -1, ordered.indices, ordered.values.double().cumsum(dim=-1) < share
    )
