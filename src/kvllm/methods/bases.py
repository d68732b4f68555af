"""Methods that select tokens in their own way by the scores of a base method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from kvllm.methods import build, method_class
from kvllm.methods.base import LayerShape, Method
from kvllm.methods.rope import Rope


class OnBase(Method):
    """A method whose fields `base` and `base_options` specify the method that scores."""

    base: str
    base_options: Mapping[str, Any]

    def __post_init__(self) -> None:
        _ = self.scorer  # raises UsageError for an invalid base

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
