"""The states of a model's recurrent layers, which transformers keeps; attention layers use our own caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvllm.layers import LayerKind, Recurrent


class NoPairs(DynamicLayer):
    """transformers' cache of an attention layer: empty, since our attention function keeps keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def states_of(model: PreTrainedModel, kinds: Sequence[LayerKind]) -> Cache | None:
    """The initial states of a request; None if no layer is recurrent."""
    if Recurrent() not in kinds:
        return None
    states = DynamicCache(config=model.config.get_text_config())
    for i, kind in enumerate(kinds):
        if kind != Recurrent():
            states.layers[i] = NoPairs()
    return states
