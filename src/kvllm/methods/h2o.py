"""H2O, the heavy hitters (arXiv:2306.14048): tokens with the most accumulated attention."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.attention import causal_attention, seen
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass


@register("h2o")
@strict_dataclass
class H2O(Method):
    """Keep the tokens with the largest sum of causal attention.

    Same: a key's attention weight, summed over queries; the newest tokens are kept (here the buffer).
    Differs: the paper sums over every query since the key was written. Serving kernels do not return weights, so here
    the sum is computed at compression time, over the stored queries, with a softmax over the candidates only. Many
    tokens are evicted at once (the paper: one per step). The heads of a query group are averaged, so that each KV head
    makes one selection.
    """

    average: bool = Field(
        False,
        description="Divide by the number of queries that can attend to the key, as kvpress does in ObservedAttention. "
        "The plain sum favours old keys, which more queries attend to.",
    )

    def score(self, window: Window) -> Tensor:
        weights = causal_attention(window)
        if self.average:
            return weights.sum(dim=(2, 3)) / seen(window).sum(dim=(2, 3)).clamp(min=1)
        return weights.mean(dim=2).sum(dim=2)
