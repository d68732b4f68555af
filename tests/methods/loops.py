"""What the methods' tests compare with: the definitions in float64, one head and one query at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvllm.methods.base import Window


def newest(window: Window, count: int) -> list[int]:
    """Entries of the newest queries, the newest first."""
    return sorted(range(window.queries.shape[1]), key=lambda q: -int(window.query_positions[q]))[:count]


def position_of(window: Window, g: int, q: int) -> int:
    """Of the query in entry q of the group's g-th head, from the first candidate."""
    return int(window.query_positions[q]) - (0 if window.query_shifts is None else int(window.query_shifts[g]))


def behind(window: Window, g: int, entries: list[int]) -> list[int]:
    """Those of the entries whose query sees every candidate."""
    return [q for q in entries if position_of(window, g, q) >= window.num_tokens - 1]


def weights(window: Window, b: int, h: int, g: int, q: int) -> Tensor:
    """Causal attention of one query head's query over the candidates, [num_tokens]; zeros if it sees none."""
    group_size = window.queries.shape[2] // window.num_kv_heads
    query = window.queries[b, q, h * group_size + g].double()
    position = int(window.positions[b, h, -1]) + position_of(window, g, q) - (window.num_tokens - 1)
    result = torch.zeros(window.num_tokens, dtype=torch.float64)
    seen = [t for t in range(window.num_tokens) if window.positions[b, h, t] <= position]
    if seen:
        logits = torch.stack([query @ window.keys[b, t, h].double() for t in seen]) / query.shape[0] ** 0.5
        result[seen] = logits.softmax(dim=0)
    return result


def group_size(window: Window) -> int:
    return window.queries.shape[2] // window.num_kv_heads


def per_head(window: Window, score: Callable[[int, int], Tensor]) -> Tensor:
    """Stack score(b, h), [num_tokens] each, to [batch, num_kv_heads, num_tokens] in float32."""
    rows = [[score(b, h) for h in range(window.num_kv_heads)] for b in range(len(window.keys))]
    return torch.stack([torch.stack(row) for row in rows]).float()


def pooled(x: list[float], kernel_size: int) -> list[float]:
    """Mean with the neighbours, padded with zeros."""
    half = kernel_size // 2
    return [sum(x[max(0, t - half) : t + half + 1]) / kernel_size for t in range(len(x))]
