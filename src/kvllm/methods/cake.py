"""CAKE (arXiv:2503.12491): attention's mean and variance, with budgets by layer preference."""

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
    """Keep what the newest queries look at steadily or, weighted by gamma, now and then.

    Score: mean over the observed queries plus `gamma` times their variance, average pooling, mean over the heads of a
    query group (that mean, and dividing by the number of queries, are *ours*). Layer budgets come from a table in
    `retention_ratio`, which `kvllm eval calibrate-layers --rule cake` makes from the preferences of `preferences`; the
    paper computes them anew for every prompt. With one ratio all layers keep the same.
    """

    num_observed: Count = Field(32, description="Number of newest stored queries that are used.")
    gamma: Annotated[float, Field(ge=0, description="Weight of the variance beside the mean.")] = 200.0
    kernel_size: KernelSize = 5

    def score(self, window: Window) -> Tensor:
        mean, variance = mean_and_variance(window, self.num_observed)
        scores = avg_pool1d(
            (mean + self.gamma * variance).flatten(1, 2), self.kernel_size, stride=1, padding=self.kernel_size // 2,
            count_include_pad=False,
        )  # fmt: skip
        return scores.unflatten(1, mean.shape[1:3]).mean(dim=2)


def mean_and_variance(window: Window, num_observed: int) -> tuple[Tensor, Tensor]:
    """Of the attention that each candidate gets from the observed queries, those that see all candidates.

    returns [batch, num_kv_heads, group_size, num_tokens] each; zero for a head that has no such query
    """
    weights, mean = observed_attention(window, num_observed)
    used = (weights.sum(dim=-1, keepdim=True) > 0).to(weights)
    squares = (weights - mean.unsqueeze(3)).square() * used
    return mean, squares.sum(dim=3) / used.sum(dim=3).clamp(min=1)


def preferences(window: Window, num_observed: int, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """[batch]: how much budget each member's layer prefers, H ** (1 / tau1) * V ** (1 / tau2).

    H is the entropy of the mean attention over the candidates, V the sum of the variances over the queries; of both the
    mean over all heads.
    """
    mean, variance = mean_and_variance(window, num_observed)
    entropy = -torch.special.xlogy(mean, mean).sum(dim=-1).mean(dim=(1, 2))
    return entropy ** (1 / tau1) * variance.sum(dim=-1).mean(dim=(1, 2)) ** (1 / tau2)
