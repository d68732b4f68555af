"""Survivors that stand in for what was evicted: keys that win back its attention, values that win back its output.

Both are ridge regressions over the stored queries, for each layer and KV head by itself. They see attention inside the
window only, so they are exact for no query; the ridge keeps them near the survivors' own keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvllm.methods.base import Window


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """[batch, num_kv_heads, num_kept, head_dim] in float32 of tokens [batch, num_tokens, num_kv_heads, head_dim]."""
    return tokens.float().transpose(1, 2).gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))


def shift_keys(window: Window, indices: Tensor, ridge: float) -> Tensor:
    """One vector for each head that, added to its kept keys, gives them the weight that the evicted ones had.

    Without it attention to the window shrinks to the share s of the weights that survive, and all else gains. A shift d
    adds the same to a query's logits on all kept keys, and exp(q.d) = 1 / s would undo the loss for that query.

    indices: [batch, num_kv_heads, num_kept]
    returns  [batch, num_kv_heads, 1, head_dim] in float32
    """
    weights = window.logits().softmax(dim=-1)  # [batch, num_kv_heads, group_size, num_queries, num_tokens]
    kept = weights.gather(-1, indices[:, :, None, None].expand(*weights.shape[:-1], -1)).sum(dim=-1)
    lost = -kept.clamp(min=1e-3).log().flatten(2, 3).unsqueeze(-1)  # [batch, num_kv_heads, group_size * num_queries, 1]
    queries = window.grouped_queries().flatten(2, 3) * window.keys.shape[-1] ** -0.5
    return ridge_solve(queries, lost, ridge).transpose(-1, -2)


def refit_values(window: Window, indices: Tensor, keys: Tensor, ridge: float) -> Tensor:
    """Values for the kept keys with which the stored queries get from them what they got from the whole window.

    indices: [batch, num_kv_heads, num_kept]
    keys:    [batch, num_kv_heads, num_kept, head_dim], as they will be stored, in float32
    returns  the same shape in float32
    """
    queries = window.grouped_queries().flatten(2, 3)  # [batch, num_kv_heads, group_size * num_queries, head_dim]
    before = window.logits().flatten(2, 3).softmax(dim=-1) @ window.values.float().transpose(1, 2)
    after = (queries @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5).softmax(dim=-1)
    values = gather_tokens(window.values, indices)
    return values + ridge_solve(after, before - after @ values, ridge)


def ridge_solve(rows: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """The x that minimises |rows @ x - targets|^2 + r |x|^2, where r is `ridge` times the mean square of a column.

    rows: [..., n, k]; targets: [..., n, m]; returns [..., k, m]
    """
    gram = rows.transpose(-1, -2) @ rows
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Where no query looks at anything the ridge would be 0 too; the smallest normal number keeps the matrix regular.
    strength = (ridge * diagonal.mean(dim=-1)).clamp(min=torch.finfo(gram.dtype).tiny)
    gram = gram + torch.diag_embed(strength.unsqueeze(-1).expand(diagonal.shape))
    return torch.linalg.solve(gram, rows.transpose(-1, -2) @ targets)
