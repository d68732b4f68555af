"""TOVA (arXiv:2401.06104): what the newest token looks at."""

from __future__ import annotations

from torch import Tensor

from kvllm.methods import register
from kvllm.methods.attention import causal_attention
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass


@register("tova")
@strict_dataclass
class TOVA(Method):
    """Keep what the newest query looks at, averaged over all heads: one choice for all heads of a layer.

    Same: one query, mean over every query head, a choice for each layer; the newest token stays (here the buffer).
    Differs: the paper evicts one token a step, here many at once; the newest query is the newest stored one, up to
    `query_stride` - 1 tokens old; the softmax is over the candidates alone, not over the prompt and the buffer too.
    Under tensor parallelism a rank averages its own heads.
    """

    def score(self, window: Window) -> Tensor:
        newest = window.query_positions.argmax(dim=0, keepdim=True)
        # The newest query's row out of all: a product with a single query rounds differently from batch to batch.
        weights = causal_attention(window).index_select(3, newest)  # [batch, num_kv_heads, group_size, 1, num_tokens]
        shared = weights.double().mean(dim=(1, 2, 3)).float()
        return shared.unsqueeze(1).expand(-1, window.num_kv_heads, -1)
