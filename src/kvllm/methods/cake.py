"""CAKE (arXiv:2503.12491): mean and variance of attention, and layer budgets by preference."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvllm.methods import register
from kvllm.methods.attention import observed_attention
from kvllm.methods.base import Method, Window
from kvllm.options import Count, KernelSize, strict_dataclass


@register("cake")
@strict_dataclass
class CAKE(Method):
    """Keep the tokens that get much attention from the newest queries, or attention that varies between them.

    Score: mean attention over the observed queries plus `gamma` times its variance, average pooling, then the mean over
    the heads of a query group (that mean, and dividing by the number of queries, are *ours*). Layer budgets come from
    a table in `retention_ratio`, which `kvllm eval calibrate-layers --rule cake` computes from `preferences`; the paper
    computes them for every prompt. With a single ratio, all layers keep the same number of tokens.
    """

    num_observed: Count = Field(32, description="Number of newest stored queries to use.")
    gamma: Annotated[float, Field(ge=0, description="Weight of the variance relative to the mean.")] = 200.0
    kernel_size: KernelSize = 5

    def score(self, window: Window) -> Tensor:
        mean, variance = mean_and_variance(window, self.num_observed)
        scores = avg_pool1d(
            (mean + self.gamma * variance).flatten(1, 2), self.kernel_size, stride=1, padding=self.kernel_size // 2,
            count_include_pad=False,
        )  # fmt: skip
        return scores.unflatten(1, mean.shape[1:3]).mean(dim=2)


def mean_and_variance(window: Window, num_observed: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over the observed queries of the attention to each candidate.

    Uses only the queries that follow all candidates.
    returns [batch, num_kv_heads, group_size, num_tokens] each; zero for a head that has no such query
    """
    weights, mean = observed_attention(window, num_observed)
    used = (weights.sum(dim=-1, keepdim=True) > 0).to(weights)
    squares = (weights - mean.unsqueeze(3)).square() * used
    return mean, squares.sum(dim=3) / used.sum(dim=3).clamp(min=1)


def preferences(window: Window, num_observed: int, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """[batch]: CAKE's preference score of each member's layer, H ** (1 / tau1) * V ** (1 / tau2).

    H is the entropy of the mean attention over the candidates, V the sum over the candidates of the variance over the
    queries; both are averaged over all heads.
    """
    mean, variance = mean_and_variance(window, num_observed)
    entropy = -torch.special.xlogy(mean, mean).sum(dim=-1).mean(dim=(1, 2))
    return entropy ** (1 / tau1) * variance.sum(dim=-1).mean(dim=(1, 2)) ** (1 / tau2)
