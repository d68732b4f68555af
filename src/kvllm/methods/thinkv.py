"""ThinKV (arXiv:2510.01290): stretches of thought by type, each with a share of the cache that shrinks with age."""

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
    """Keep of each stretch of thought as much as its type and age deserve, chosen by a base score.

    Same: stretches of `segment_size` tokens are labelled reasoning, execution or transition by how sparse attention is,
    which says how much of them is kept; each transition that follows shrinks what is kept of those before it by
    `decay`, down to `min_quota`.
    Differs:
    - A method has no state, so a stretch is labelled when it is compressed, by the stored queries' attention to it; the
      paper labels it while it is written, by that of some chosen layers. Here each layer and KV head labels for itself.
    - Shares of K instead of fixed numbers of tokens, since every head keeps exactly K.
    - The paper picks tokens by clustering keys; `base` names any method, keydiff by default, which keeps unlike keys.
    - Thresholds, which the paper calibrates for each model, were not available to us, nor which type is the sparsest:
      here transitions are, and reasoning the least.
    - The survivors' precision by type is left out: the cache has one precision, `survivor_bits`.
    """

    base: str = Field("keydiff", description="Method that scores the tokens inside a stretch.")
    base_options: BaseOptions = Field(default_factory=dict)
    segment_size: Count = Field(32, description="Tokens of a stretch of thought.")
    sparsity_cut: Share = Field(
        0.01,
        description="A weight is near zero below this share of the largest that the query gives the stretch.",
    )
    execution_above: Share = Field(0.5, description="Share of near-zero weights from which on a stretch is execution.")
    transition_above: Share = Field(
        0.8, description="Share of near-zero weights from which on it is a transition, at least `execution_above`."
    )
    execution_share: Share = Field(0.5, description="What execution keeps, for each token that reasoning keeps.")
    transition_share: Share = Field(0.25, description="What a transition keeps, for each token that reasoning keeps.")
    decay: float = Field(0.5, gt=0, le=1, description="Factor on what is kept of a stretch at each later transition.")
    min_quota: int = Field(4, ge=0, description="Tokens that every stretch keeps, whatever its type and age.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transition_above < self.execution_above:
            raise UsageError(
                f"transition_above={self.transition_above}: must be execution_above={self.execution_above} or more."
            )

    def score(self, window: Window) -> Tensor:
        """The order in which slots are given out, so that the K best fill every quota."""
        segment = segments(window.positions, self.segment_size)
        sparse = sparsity(window, segment, self.sparsity_cut)
        transition = sparse >= self.transition_above
        share = torch.where(sparse >= self.execution_above, self.execution_share, 1.0)
        share = torch.where(transition, self.transition_share, share)
        share = share * self.decay ** transitions_after(transition, segment) + 1e-6  # never nothing at all
        share = share / share.sum(dim=-1, keepdim=True)
        return slot_priority(self.scorer.score(window), share, segment, self.min_quota)


def segments(positions: Tensor, segment_size: int) -> Tensor:
    """[batch, num_kv_heads, num_tokens]: number of each token's stretch of the text, from 0 without gaps (int64)."""
    stretch = (positions - positions[..., :1]) // segment_size
    return pad(stretch.diff(dim=-1) > 0, (1, 0)).cumsum(dim=-1)


def sparsity(window: Window, segment: Tensor, cut: float) -> Tensor:
    """Share of the weights near zero in each token's stretch, a mean over the group's queries that see all of it.

    segment: [batch, num_kv_heads, num_tokens]
    returns  the same shape, float32; 0 where no query sees a stretch
    """
    weights = causal_attention(window)  # [batch, num_kv_heads, group_size, num_queries, num_tokens]
    index = segment[:, :, None, None].expand_as(weights)
    zeros = torch.zeros_like(weights)
    largest = zeros.scatter_reduce(-1, index, weights, "amax").gather(-1, index)
    low = zeros.scatter_add(-1, index, (weights < cut * largest).to(weights))  # whole numbers: exact in any order
    size = zeros.scatter_add(-1, index, torch.ones_like(weights))
    whole = zeros.scatter_add(-1, index, seen(window).to(weights)) == size
    share = (low / size.clamp(min=1)).gather(-1, index).double()
    counts = whole.gather(-1, index)
    total = (share * counts).sum(dim=(2, 3)) / counts.sum(dim=(2, 3)).clamp(min=1)
    return total.float()


def transitions_after(transition: Tensor, segment: Tensor) -> Tensor:
    """How many transitions follow each token's stretch; all [batch, num_kv_heads, num_tokens]."""
    first = pad(segment.diff(dim=-1) > 0, (1, 0), value=True)  # of each stretch
    starts = (transition & first).int()
    return starts.sum(dim=-1, keepdim=True) - starts.cumsum(dim=-1)
