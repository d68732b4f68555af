"""Attention over a cache of our own, for any transformers model that lets its attention function be chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from kvllm.errors import UsageError
from kvllm.reference.cache import LayerCache

NAME = "kvllm_reference"
# What an attention layer may ask for that a shortened cache would answer wrongly, or that is not done here.
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
_layers: ContextVar[list[LayerCache]] = ContextVar("layers")


@contextmanager
def attention_through(model: PreTrainedModel, layers: list[LayerCache]) -> Iterator[None]:
    """While this is open, the model's forward passes read and extend `layers`, one cache a layer."""
    before = model.config._attn_implementation
    token = _layers.set(layers)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _layers.reset(token)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer, after RoPE.

    query:   [1, num_heads, num_new, head_dim]
    key:     [1, num_kv_heads, num_new, head_dim]; value alike
    returns  [1, num_new, num_heads, head_dim], and no weights
    """
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise UsageError(f"{type(module).__name__} uses {name}={options[name]}, which the reference does not do.")
    cache = _layers.get()[module.layer_idx]  # type: ignore[index]
    num_new = query.shape[2]
    cache.append(*(x[0].transpose(0, 1) for x in (query, key, value)))
    output = scaled_dot_product_attention(
        query,
        cache.keys.transpose(0, 1)[None],
        cache.values.transpose(0, 1)[None],
        attn_mask=causal_mask(num_new, len(cache.keys), query.device),
        scale=options.get("scaling"),
        enable_gqa=True,
    )
    return output.transpose(1, 2), None


def causal_mask(num_new: int, num_tokens: int, device: torch.device) -> Tensor | None:
    """[num_new, num_tokens], True where a query may look: at all that was there before, and at the new up to itself."""
    if num_new == 1:
        return None
    return torch.ones(num_new, num_tokens, dtype=torch.bool, device=device).tril(num_tokens - num_new)


AttentionInterface.register(NAME, attend)
