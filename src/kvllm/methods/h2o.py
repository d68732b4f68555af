"""H2O, the heavy hitters (arXiv:2306.14048): what has drawn the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvllm.methods import register
from kvllm.methods.attention import causal_attention, seen
from kvllm.methods.base import Method, Window
from kvllm.methods.checks import check_flag


@register("h2o")
@dataclass(frozen=True)
class H2O(Method):
    """Keep the tokens with the largest sum of causal attention.

    Same: the sum over queries of a key's attention weight; the newest tokens stay (here the buffer).
    Differs: the paper adds up every query since the key was written. Serving kernels hand out no weights, so the sum
    is taken at compression time, over the stored queries and with a softmax over the candidates alone. The paper
    evicts one token a step, here many at once. The heads of a group are averaged, so a KV head has one choice.

    average: divide by the number of queries that see the key, as kvpress does in ObservedAttention. The plain sum
             favours old keys, which more queries saw.
    """

    average: bool = False

    def __post_init__(self) -> None:
        check_flag("average", self.average)

    def score(self, window: Window) -> Tensor:
        weights = causal_attention(window)
        if self.average:
            return weights.sum(dim=(2, 3)) / seen(window).sum(dim=(2, 3)).clamp(min=1)
        return weights.mean(dim=2).sum(dim=2)
