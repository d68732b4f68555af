"""PyramidKV (arXiv:2406.02069): SnapKV with larger budgets in lower layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from kvllm.budgets import Budget, equal_groups, most_groups
from kvllm.errors import UsageError
from kvllm.methods import register
from kvllm.methods.snapkv import SnapKV
from kvllm.options import strict_dataclass


@register("pyramidkv")
@strict_dataclass
class PyramidKV(SnapKV):
    """Keep tokens as SnapKV does, with budgets that decrease from the lowest layer to the highest.

    With a mean ratio r, the highest layer keeps r / beta of a window and the lowest 2 r - r / beta, linear in between,
    as in the paper. In the paper, each layer has its own budget, for the prompt. Here neighbouring layers share the
    mean of theirs, since each group of layers is a KV cache group in vLLM, and the budgets apply to every window.
    """

    beta: Annotated[float, Field(ge=1, description="Mean budget divided by the highest layer's budget.")] = 20.0
    num_groups: int = Field(
        0,
        ge=0,
        le=4,
        description="Number of equal-sized groups of layers that share a budget; 0 = as many as possible, up to 4.",
    )

    def layer_budgets(self, mean_ratio: float, layers: Sequence[int]) -> tuple[Budget, ...]:
        groups = equal_groups(layers, self.num_groups or most_groups(len(layers)))
        lowest, highest = mean_ratio / self.beta, 2 * mean_ratio - mean_ratio / self.beta
        made = []
        for number, group in enumerate(groups):
            middle = (2 * number + 1) / (2 * len(groups))  # the mean of a straight line over the group's layers
            place = (middle * len(layers) - 0.5) / max(len(layers) - 1, 1)
            made.append(Budget(group, round(highest - place * (highest - lowest), 10)))
        if made[0].ratio >= 1:
            raise UsageError(
                f"beta={self.beta}: with a mean retention_ratio of {mean_ratio}, the lowest layers would keep "
                f"{made[0].ratio} of a window, which must be below 1; use a smaller beta or a lower ratio."
            )
        return tuple(made)
