"""SnapKV (arXiv:2404.14469), in the form that papers on reasoning use while decoding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import max_pool1d

from kvllm.methods import register
from kvllm.methods.base import Method, Window


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Method):
    """Keep what the newest queries look at, and its neighbours.

    The logits are maximised over the heads of a group, then softmax over the candidates, mean over the queries, max
    pooling. The newest tokens, which SnapKV always keeps, are the buffer here, so they are no candidates.

    num_observed: how many queries look; with `query_stride` s they span the newest s * num_observed tokens
    kernel_size:  width of the pooling, odd
    """

    num_observed: int = 8
    kernel_size: int = 7

    def __post_init__(self) -> None:
        if self.num_observed < 1:
            raise ValueError(f"num_observed={self.num_observed}: must be 1 or more.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size}: must be odd, so that the pooling is centred; 1 = none.")

    def score(self, window: Window) -> Tensor:
        newest = window.query_positions.argsort(descending=True)[: self.num_observed]
        logits = window.logits()[:, :, :, newest].amax(dim=2)  # [batch, num_kv_heads, num_observed, num_tokens]
        weights = logits.softmax(dim=-1).mean(dim=2)
        return max_pool1d(weights, self.kernel_size, stride=1, padding=self.kernel_size // 2)
