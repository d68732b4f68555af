"""KeyDiff (arXiv:2504.15364): keep the keys that differ most from the mean key."""

from __future__ import annotations

from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.methods.products import products
from kvllm.options import strict_dataclass

SMALLEST = 1e-8  # smallest norm to divide by


@register("keydiff")
@strict_dataclass
class KeyDiff(Method):
    """Keep the keys with the smallest cosine to the mean of the normalised keys; uses no queries.

    Same: anchor and score, on keys after RoPE, separately for each KV head (as in kvpress).
    Differs: the anchor is the mean over the candidates, not over the whole cache; windows are compressed during
    decoding (the paper compresses blocks during prefill).
    """

    def score(self, window: Window) -> Tensor:
        keys = window.head_keys
        norms = keys.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)
        anchor = products((1 / norms).transpose(-1, -2), keys) / window.num_tokens  # the mean of the normalised keys
        cosines = products(keys, anchor.transpose(-1, -2)) / (norms * anchor.norm(dim=-1, keepdim=True).clamp(SMALLEST))
        return -cosines.squeeze(-1)
