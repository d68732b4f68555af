"""Methods on top of a base method: they take its scores and select in their own way."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from kvllm.methods import build, method_class
from kvllm.methods.base import LayerShape, Method
from kvllm.methods.rope import Rope


class OnBase(Method):
    """A method with the fields `base` and `base_options`, which name the method that scores."""

    base: str
    base_options: Mapping[str, Any]

    def __post_init__(self) -> None:
        _ = self.scorer  # refuses what it cannot build

    @cached_property
    def scorer(self) -> Method:
        return build(method_class("base", self.base), self.base, "base_options", self.base_options)

    @property
    def uses_rope(self) -> bool:
        return self.scorer.uses_rope

    @property
    def counts_positions(self) -> bool:
        return self.scorer.counts_positions

    def check_rope(self, rope: Rope | None) -> None:
        if self.scorer.uses_rope:
            self.scorer.check_rope(rope)

    def check_layers(self, shape: LayerShape) -> None:
        self.scorer.check_layers(shape)
