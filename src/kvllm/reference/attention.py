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
from kvllm.layers import Local
from kvllm.methods.attention import query_factor
from kvllm.reference.cache import LayerCache

NAME = "kvllm_reference"
# What an attention layer may ask for that a shortened cache would answer wrongly, or that is not done here.
UNSUPPORTED = ("position_bias", "alibi")
_layers: ContextVar[list[LayerCache]] = ContextVar("layers")


@contextmanager
def attention_through(model: PreTrainedModel, layers: list[LayerCache]) -> Iterator[None]:
    """While this is open, the model's forward passes read and extend `layers`, one cache a layer."""
    decoder = model.get_decoder()  # not all of the model: a vision tower keeps its own attention
    before = decoder.config._attn_implementation
    token = _layers.set(layers)
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
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
    scale, softcap, sinks = (options.get(name) for name in ("scaling", "softcap", "s_aux"))
    factor = None if scale is None else query_factor(scale, query.shape[-1])
    kept_query = query if factor is None else query * factor
    seen = cache.append(*(x[0].transpose(0, 1) for x in (kept_query, key, value)))
    window = options.get("sliding_window")
    if cache.local is None and window is not None and cache.num_appended > window:
        raise ValueError(f"{cache.num_appended} tokens: {type(module).__name__} looks back only {window}.")
    keys, values = (x.transpose(0, 1)[None] for x in seen)
    if not isinstance(cache.local, Local):
        mask = causal_mask(num_new, len(cache.keys), query.device)
    else:
        mask = local_mask(num_new, len(cache.keys), cache.local, query.device)
    if softcap is None and sinks is None:
        output = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    else:
        output = attention_with_extras(query, keys, values, mask, scale, softcap, sinks)
    return output.transpose(1, 2), None


def attention_with_extras(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention whose logits are capped at +-softcap, and whose heads have one more logit without a value, the sink.

    query, keys, values, mask: as in `scaled_dot_product_attention`; sinks: [num_heads]
    """
    group_size = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group_size, dim=1), values.repeat_interleave(group_size, dim=1)
    logits = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], dim=-1)
    return logits.softmax(dim=-1)[..., : keys.shape[2]] @ values


def causal_mask(num_new: int, num_tokens: int, device: torch.device) -> Tensor | None:
    """[num_new, num_tokens], True where a query may look: at all that was there before, and at the new up to itself."""
    if num_new == 1:
        return None
    return torch.ones(num_new, num_tokens, dtype=torch.bool, device=device).tril(num_tokens - num_new)


def local_mask(num_new: int, num_tokens: int, local: Local, device: torch.device) -> Tensor:
    """`causal_mask` of a local layer, whose cache holds the whole text."""
    positions = torch.arange(num_tokens, device=device)
    asking = positions[-num_new:, None]
    return (positions <= asking) & (positions >= local.first_seen(asking))


AttentionInterface.register(NAME, attend)
