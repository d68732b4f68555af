"""KeyDiff (arXiv:2504.15364): keys unlike the others."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass


@register("keydiff")
@strict_dataclass
class KeyDiff(Method):
    """Keep the keys with the smallest cosine to the mean of the normalised keys; looks at no query.

    Same: anchor and score, on keys after RoPE, each KV head on its own (as in kvpress).
    Differs: the anchor is the mean over the candidates, not over all of the cache; the paper compresses block by
    block during prefill, here a window at a time during decoding.
    """

    def score(self, window: Window) -> Tensor:
        keys = window.keys.float().transpose(1, 2)  # [batch, num_kv_heads, num_tokens, head_dim]
        anchor = normalize(keys, dim=-1).mean(dim=2, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)
