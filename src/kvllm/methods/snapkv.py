"""SnapKV (arXiv:2404.14469), in the form that papers on reasoning models use during decoding."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.options import Count, KernelSize, strict_dataclass


@register("snapkv")
@strict_dataclass
class SnapKV(Method):
    """Keep the tokens with the most attention from the newest queries, and their neighbours.

    Score: maximum of the logits over the heads of a query group, softmax over the candidates, mean over the queries,
    max pooling. The newest tokens, which SnapKV always keeps, are in the buffer here and so not candidates.
    """

    num_observed: Count = Field(
        8,
        description="Number of newest stored queries to use; with a `query_stride` of s they span the newest "
        "s * num_observed tokens.",
    )
    kernel_size: KernelSize = 7

    def score(self, window: Window) -> Tensor:
        newest = window.query_positions.argsort(descending=True)[: self.num_observed]
        logits = window.logits()[:, :, :, newest].amax(dim=2)  # [batch, num_kv_heads, num_observed, num_tokens]
        weights = logits.softmax(dim=-1).mean(dim=2)
        return max_pool1d(weights, self.kernel_size, stride=1, padding=self.kernel_size // 2)
