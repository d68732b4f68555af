"""Attention over our own cache, for any transformers model whose attention function can be replaced."""

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
# Options of an attention layer that would be wrong with a shortened cache, or that are not implemented here.
UNSUPPORTED = ("position_bias", "alibi")
_layers: ContextVar[list[LayerCache]] = ContextVar("layers")


@contextmanager
def attention_through(model: PreTrainedModel, layers: list[LayerCache]) -> Iterator[None]:
    """Within this context, the model's forward passes read and extend `layers`, one cache per layer."""
    decoder = model.get_decoder()  # a vision tower keeps its own attention
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
    """The attention function that transformers calls in every attention layer, after RoPE.

    query:      [1, num_heads, num_new, head_dim]
    key, value: [1, num_kv_heads, num_new, head_dim]
    returns     [1, num_new, num_heads, head_dim], and None for the attention weights
    """
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise UsageError(f"{type(module).__name__} uses {name}={options[name]}: the reference does not support it.")
    cache = _layers.get()[module.layer_idx]  # type: ignore[index]
    num_new = query.shape[2]
    scale, softcap, sinks = (options.get(name) for name in ("scaling", "softcap", "s_aux"))
    factor = None if scale is None else query_factor(scale, query.shape[-1])
    kept_query = query if factor is None else query * factor
    seen = cache.append(*(x[0].transpose(0, 1) for x in (kept_query, key, value)))
    window = options.get("sliding_window")
    if cache.local is None and window is not None and cache.num_appended > window:
        raise ValueError(f"{cache.num_appended} tokens: {type(module).__name__} has a sliding window of only {window}.")
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
    """Attention with logits capped at +-softcap, and with a sink per head: one more logit, without a value.

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
    """[num_new, num_tokens] bool, True where a query attends: to all earlier tokens, and to new ones up to itself.

    None if there is only one new token, which attends to everything.
    """
    if num_new == 1:
        return None
    return torch.ones(num_new, num_tokens, dtype=torch.bool, device=device).tril(num_tokens - num_new)


def local_mask(num_new: int, num_tokens: int, local: Local, device: torch.device) -> Tensor:
    """`causal_mask` of a local layer, whose cache holds the whole text."""
    positions = torch.arange(num_tokens, device=device)
    asking = positions[-num_new:, None]
    return (positions <= asking) & (positions >= local.first_seen(asking))


AttentionInterface.register(NAME, attend)
