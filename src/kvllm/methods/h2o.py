"""H2O, the heavy hitters (arXiv:2306.14048): what has drawn the most attention so far."""

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

    Same: the sum over queries of a key's attention weight; the newest tokens stay (here the buffer).
    Differs: the paper adds up every query since the key was written. Serving kernels hand out no weights, so the sum
    is taken at compression time, over the stored queries and with a softmax over the candidates alone. The paper
    evicts one token a step, here many at once. The heads of a query group are averaged, so a KV head has one choice.
    """

    average: bool = Field(
        False,
        description="Divide by the number of queries that see the key, as kvpress does in ObservedAttention. The plain "
        "sum favours old keys, which more queries saw.",
    )

    def score(self, window: Window) -> Tensor:
        weights = causal_attention(window)
        if self.average:
            return weights.sum(dim=(2, 3)) / seen(window).sum(dim=(2, 3)).clamp(min=1)
        return weights.mean(dim=2).sum(dim=2)
