"""DefensiveKV (github.com/FFY0/DefensiveKV): select by worst-case instead of mean attention."""

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
    """Keep the tokens with most of the mean attention, then those with the highest attention of any query or head.

    Same: tokens that make up `first_mass` of the mean attention come first; the others are ranked by the maximum over
    the queries and the heads of a query group of weights pooled over 5 tokens (renormalised to the row's mass), but at
    least the head's mean, times the norm of the token's contribution.
    Differs: that norm is the L1 norm of the value, not of W_o v, since methods do not see W_o. All heads keep the same
    number, since the paged cache has one length for all (the paper moves budget between heads). The queries are the
    stored ones of the buffer, up to 32. The buffer, which is always kept, is not part of the softmax, so the paper's
    correction of `first_mass` for it is unnecessary.
    """

    num_observed: Count = Field(32, description="Number of newest stored queries to use.")
    kernel_size: KernelSize = 5
    first_mass: Share = Field(0.9, description="Share of the mean attention whose tokens are kept first.")

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
    """Mask (bool, same shape) of each row's largest entries, up to a cumulative sum of `share` of the row's sum."""
    ordered = (weights / weights.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter(
        -1, ordered.indices, ordered.values.double().cumsum(dim=-1) < share
    )
