"""Helpers for attention-based methods: causal masks, the newest queries, attention weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvllm.methods.base import Window


def query_factor(scale: float, head_dim: int) -> float | None:
    """Factor to apply to a layer's queries before storing them; None if it is 1.

    Methods scale logits by head_dim ** -0.5. Some models use a different scale (Gemma 2, Granite), and some
    implementations scale the queries first and then use 1.0 (OPT in transformers).

    scale: the layer's softmax scale
    """
    factor = scale * head_dim**0.5
    return None if math.isclose(factor, 1) else factor


def text_positions(window: Window) -> Tensor:
    """[batch, num_kv_heads, group_size, num_queries]: text position of each head's queries.

    Computed relative to the last candidate, which is always the token right before the buffer. Earlier candidates
    are not contiguous under the budget policy.
    """
    from_last = window.head_query_positions - (window.num_tokens - 1)
    return window.positions[..., -1:, None] + from_last


def newest_queries(window: Window, count: int) -> Window:
    """The window with at most its `count` newest queries, oldest first."""
    newest = window.query_positions.argsort()[-count:]
    return replace(window, queries=window.queries[:, newest], query_positions=window.query_positions[newest])


def seen(window: Window) -> Tensor:
    """Causal mask, [batch, num_kv_heads, group_size, num_queries, num_tokens] bool: query position >= key position."""
    return window.positions[:, :, None, None] <= text_positions(window).unsqueeze(-1)


def causal_attention(window: Window) -> Tensor:
    """Each query's softmax over the candidates that it may attend to; all zeros for a query with none.

    returns [batch, num_kv_heads, group_size, num_queries, num_tokens] in float32
    """
    mask = seen(window)
    # A finite minimum, not -inf: a fully masked row would be NaN, which the product with the mask could not zero.
    logits = window.logits().masked_fill(~mask, torch.finfo(torch.float32).min)
    return logits.softmax(dim=-1) * mask


def observed_attention(window: Window, count: int) -> tuple[Tensor, Tensor]:
    """Attention weights of the newest queries, restricted to those that follow every candidate (in the buffer).

    A query inside the window would spread its whole weight over the few keys before it and so overrate them.

    returns weights [batch, num_kv_heads, group_size, count, num_tokens], zero for queries inside the window, and their
            mean over the other queries [batch, num_kv_heads, group_size, num_tokens], zero for a head without any
    """
    window = newest_queries(window, count)
    sees_all = (window.head_query_positions >= window.num_tokens - 1).unsqueeze(-1)  # [group_size, count, 1]
    weights = window.weights * sees_all
    return weights, weights.sum(dim=3) / sees_all.sum(dim=1).clamp(min=1)


def pool(weights: Tensor, kernel_size: int) -> Tensor:
    """Average pooling along the last axis, zero-padded as in SnapKV."""
    flat = weights.reshape(-1, 1, weights.shape[-1])
    return avg_pool1d(flat, kernel_size, stride=1, padding=kernel_size // 2).view(weights.shape)
