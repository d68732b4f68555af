"""TOVA (arXiv:2401.06104): attention weights of the newest query."""

from __future__ import annotations

from torch import Tensor

from kvllm.methods import register
from kvllm.methods.attention import causal_attention
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass


@register("tova")
@strict_dataclass
class TOVA(Method):
    """Keep the tokens with the most attention from the newest query, averaged over all heads.

    Same: one query, the mean over all query heads, one selection for all heads of a layer; the newest token is kept
    (here the buffer).
    Differs: many tokens are evicted at once (the paper: one per step); the query is the newest stored one, up to
    `query_stride` - 1 tokens old; the softmax is over the candidates only, without prompt and buffer. Under tensor
    parallelism each rank averages over its own heads.
    """

    def score(self, window: Window) -> Tensor:
        newest = window.query_positions.argmax(dim=0, keepdim=True)
        # Computed for all queries: the rounding of a product with a single query would depend on the batch size.
        weights = causal_attention(window).index_select(3, newest)  # [batch, num_kv_heads, group_size, 1, num_tokens]
        shared = weights.double().mean(dim=(1, 2, 3)).float()
        return shared.unsqueeze(1).expand(-1, window.num_kv_heads, -1)
