"""ThinKV (arXiv:2510.01290): segments of thought get a share of the cache by type, which shrinks with age."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from kvllm.errors import UsageError
from kvllm.methods import register
from kvllm.methods.ams import slot_priority
from kvllm.methods.attention import causal_attention, seen
from kvllm.methods.base import Window
from kvllm.methods.bases import OnBase
from kvllm.options import BaseOptions, Count, Share, strict_dataclass


@register("thinkv")
@strict_dataclass
class ThinKV(OnBase):
    """Keep the best tokens by `base` of every segment of thought, up to a quota that depends on its type and age.

    Same: segments of `segment_size` tokens are labelled reasoning, execution or transition by the sparsity of attention
    to them, and the label sets the quota; every later transition multiplies the quota of earlier segments by `decay`,
    down to `min_quota`.
    Differs:
    - Methods have no state, so a segment is labelled when it is compressed, from the stored queries' attention, for
      each layer and KV head separately (in the paper, while it is generated, from a few chosen layers).
    - Quotas are shares of K instead of fixed numbers of tokens, since every head keeps exactly K.
    - `base` can be any method, by default keydiff, which keeps dissimilar keys (the paper clusters keys).
    - The paper calibrates thresholds for each model; these were not available to us, nor was the order of the types by
      sparsity. Here transitions are the sparsest and reasoning is the least sparse.
    - Survivors have the same precision for all types, `survivor_bits` (the paper: by type).
    """

    base: str = Field("keydiff", description="Method that scores the tokens within a segment.")
    base_options: BaseOptions = Field(default_factory=dict)
    segment_size: Count = Field(32, description="Number of tokens in a segment of thought.")
    sparsity_cut: Share = Field(
        0.01,
        description="An attention weight below this share of the query's largest in the segment counts as zero.",
    )
    execution_above: Share = Field(0.5, description="Share of zero weights from which a segment is execution.")
    transition_above: Share = Field(
        0.8, description="Share of zero weights from which a segment is a transition; at least `execution_above`."
    )
    execution_share: Share = Field(0.5, description="Quota of an execution segment relative to a reasoning segment.")
    transition_share: Share = Field(0.25, description="Quota of a transition relative to a reasoning segment.")
    decay: float = Field(0.5, gt=0, le=1, description="Factor on a segment's quota for each later transition.")
    min_quota: int = Field(4, ge=0, description="Minimum number of tokens that each segment keeps.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transition_above < self.execution_above:
            raise UsageError(
                f"transition_above={self.transition_above}: must be at least execution_above={self.execution_above}."
            )

    def score(self, window: Window) -> Tensor:
        """Priority of each token, such that the K highest fill every segment's quota."""
        segment = segments(window.positions, self.segment_size)
        sparse = sparsity(window, segment, self.sparsity_cut)
        transition = sparse >= self.transition_above
        share = torch.where(sparse >= self.execution_above, self.execution_share, 1.0)
        share = torch.where(transition, self.transition_share, share)
        share = share * self.decay ** transitions_after(transition, segment) + 1e-6  # never zero
        share = share / share.sum(dim=-1, keepdim=True)
        return slot_priority(self.scorer.score(window), share, segment, self.min_quota)


def segments(positions: Tensor, segment_size: int) -> Tensor:
    """[batch, num_kv_heads, num_tokens]: segment index of each token, from 0 without gaps (int64)."""
    stretch = (positions - positions[..., :1]) // segment_size
    return pad(stretch.diff(dim=-1) > 0, (1, 0)).cumsum(dim=-1)


def sparsity(window: Window, segment: Tensor, cut: float) -> Tensor:
    """Share of near-zero weights in each token's segment, averaged over the group's queries that come after all of it.

    segment: [batch, num_kv_heads, num_tokens]
    returns  the same shape, float32; 0 for a segment that no query comes after
    """
    weights = causal_attention(window)  # [batch, num_kv_heads, group_size, num_queries, num_tokens]
    index = segment[:, :, None, None].expand_as(weights)
    zeros = torch.zeros_like(weights)
    largest = zeros.scatter_reduce(-1, index, weights, "amax").gather(-1, index)
    low = zeros.scatter_add(-1, index, (weights < cut * largest).to(weights))  # integers: exact in any order
    size = zeros.scatter_add(-1, index, torch.ones_like(weights))
    whole = zeros.scatter_add(-1, index, seen(window).to(weights)) == size
    share = (low / size.clamp(min=1)).gather(-1, index).double()
    counts = whole.gather(-1, index)
    total = (share * counts).sum(dim=(2, 3)) / counts.sum(dim=(2, 3)).clamp(min=1)
    return total.float()


def transitions_after(transition: Tensor, segment: Tensor) -> Tensor:
    """Number of transitions after each token's segment; all [batch, num_kv_heads, num_tokens]."""
    first = pad(segment.diff(dim=-1) > 0, (1, 0), value=True)  # first token of each segment
    starts = (transition & first).int()
    return starts.sum(dim=-1, keepdim=True) - starts.cumsum(dim=-1)
