"""What the methods that look at attention share: who sees whom, the newest queries, causal weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvllm.methods.base import Window


def query_factor(scale: float, head_dim: int) -> float | None:
    """What to multiply a layer's queries by before they are kept; None for nothing.

    Methods scale logits by head_dim ** -0.5. Some models use another scale (Gemma 2, Granite), and some implementations
    scale the queries first and ask for 1.0 (OPT in transformers).

    scale: by which the layer's attention multiplies its logits
    """
    factor = scale * head_dim**0.5
    return None if math.isclose(factor, 1) else factor


def text_positions(window: Window) -> Tensor:
    """[batch, num_kv_heads, group_size, num_queries]: position in the text of each head's queries.

    The last candidate has always stood right before the buffer, so queries are counted from it: under the budget
    policy older candidates no longer lie side by side.
    """
    from_last = window.head_query_positions - (window.num_tokens - 1)
    return window.positions[..., -1:, None] + from_last


def newest_queries(window: Window, count: int) -> Window:
    """The same window with only its `count` newest queries, oldest first; all of them if it has fewer."""
    newest = window.query_positions.argsort()[-count:]
    return replace(window, queries=window.queries[:, newest], query_positions=window.query_positions[newest])


def seen(window: Window) -> Tensor:
    """[batch, num_kv_heads, group_size, num_queries, num_tokens] bool: whether a query stands at or after a token."""
    return window.positions[:, :, None, None] <= text_positions(window).unsqueeze(-1)


def causal_attention(window: Window) -> Tensor:
    """Each query's softmax over the candidates that it sees; zeros where it sees none.

    returns [batch, num_kv_heads, group_size, num_queries, num_tokens] in float32
    """
    mask = seen(window)
    # A finite floor instead of -inf: a row without any key then gives numbers to multiply away, not NaN.
    logits = window.logits().masked_fill(~mask, torch.finfo(torch.float32).min)
    return logits.softmax(dim=-1) * mask


def observed_attention(window: Window, count: int) -> tuple[Tensor, Tensor]:
    """Attention of those of the `count` newest queries that see every candidate: the buffer's.

    A query from inside the window would spread its weight over the few keys before it, and so overrate them.

    returns weights [batch, num_kv_heads, group_size, count, num_tokens], zero for the other queries, and their
    mean over those queries [batch, num_kv_heads, group_size, num_tokens], zero for a head that has none
    """
    window = newest_queries(window, count)
    sees_all = (window.head_query_positions >= window.num_tokens - 1).unsqueeze(-1)  # [group_size, count, 1]
    weights = window.weights * sees_all
    return weights, weights.sum(dim=3) / sees_all.sum(dim=1).clamp(min=1)


def pool(weights: Tensor, kernel_size: int) -> Tensor:
    """Average each entry of the last axis with its neighbours; the ends count zeros, as SnapKV's pooling does."""
    flat = weights.reshape(-1, 1, weights.shape[-1])
    return avg_pool1d(flat, kernel_size, stride=1, padding=kernel_size // 2).view(weights.shape)
