"""LongFlow (github.com/yisunlp/LongFLow): each token's contribution to the newest query's output."""

from __future__ import annotations

from torch import Tensor

from kvllm.methods import register
from kvllm.methods.attention import causal_attention, newest_queries
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass


@register("longflow")
@strict_dataclass
class LongFlow(Method):
    """Keep the tokens that contribute most to the newest query's output, summed over all heads.

    Same: absolute value of attention weight times value, for one query, summed over the dimensions and over all heads
    of the layer; all heads keep the same tokens.
    Differs: many tokens are evicted at once, not one per step inside the attention kernel, so the query is the newest
    stored one of each head, up to `query_stride` - 1 tokens old. Under tensor parallelism each rank sums over its own
    heads. A prompt over `prompt_budget` is scored in the same way (in LongFlow, by SnapKV).
    """

    def score(self, window: Window) -> Tensor:
        weights = causal_attention(newest_queries(window, 1)).sum(dim=(2, 3))
        size = window.values.float().abs().sum(dim=-1).transpose(1, 2)  # [batch, num_kv_heads, num_tokens]
        return (weights * size).sum(dim=1, keepdim=True).expand_as(weights).contiguous()
