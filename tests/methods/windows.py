"""Random windows for the methods' tests."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from kvllm.methods.base import Window
from kvllm.methods.rope import Rope, frequencies


def random_window(
    batch: int = 2,
    num_tokens: int = 24,
    num_queries: int = 5,
    num_kv_heads: int = 2,
    group_size: int = 3,
    head_dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Window:
    """Queries at shuffled positions, as a ring gives them, the newest half past the window, as in a buffer.

    They lie three tokens apart, and the heads of a query group take turns.
    """
    g = torch.Generator().manual_seed(seed)
    positions = torch.arange(num_queries) * 3 + num_tokens - 3 * num_queries // 2
    return Window(
        queries=(2 * torch.randn(batch, num_queries, num_kv_heads * group_size, head_dim, generator=g)).to(dtype),
        query_positions=positions[torch.randperm(num_queries, generator=g)],
        keys=torch.randn(batch, num_tokens, num_kv_heads, head_dim, generator=g).to(dtype),
        values=torch.randn(batch, num_tokens, num_kv_heads, head_dim, generator=g).to(dtype),
        positions=(torch.arange(num_tokens) + 160).expand(batch, num_kv_heads, -1),
        layers=torch.arange(batch),
        query_shifts=torch.arange(group_size) * 3 // group_size,
        rope=Rope(frequencies(10000.0, head_dim)),
    )


def one_of(window: Window, i: int) -> Window:
    """The window of one (request, layer) pair of a batch."""
    return replace(
        window,
        queries=window.queries[i : i + 1],
        keys=window.keys[i : i + 1],
        values=window.values[i : i + 1],
        positions=window.positions[i : i + 1],
        layers=window.layers[i : i + 1],
    )


def tensors_of(window: Window) -> dict[str, torch.Tensor]:
    """Copies of all that a method could write to by mistake."""
    tensors = {f.name: getattr(window, f.name) for f in fields(Window) if f.name != "rope"}
    assert window.rope is not None
    return {name: tensor.clone() for name, tensor in tensors.items()} | {"rope": window.rope.frequencies.clone()}
