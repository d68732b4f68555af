"""Survivors that stand in for what was evicted: keys that win back its attention, values that win back its output.

Both are ridge regressions over the stored queries, for each layer and KV head by itself. They see attention inside the
window only, so they are exact for no query; the ridge keeps them near the survivors' own keys and values.

A few steps of conjugate gradients solve them: what an exact solution would add lies where the queries hardly look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvllm.methods.base import Window

STEPS = 4  # of conjugate gradients, here and in the kernel
LEAST_KEPT = 1e-3  # share of the weights: where less is kept, the shift is as if it were this


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """[batch, num_kv_heads, num_kept, head_dim] in float32 of tokens [batch, num_tokens, num_kv_heads, head_dim]."""
    return _rows(tokens.float().transpose(1, 2), indices)


def shift_keys(window: Window, indices: Tensor, ridge: float) -> Tensor:
    """`key_shift` of a window's kept keys, [batch, num_kv_heads, 1, head_dim] in float32."""
    queries = window.grouped_queries().flatten(2, 3)
    return _one_by_one(key_shift, queries, window.logits().flatten(2, 3), indices, ridge=ridge)


def refit_values(window: Window, indices: Tensor, ridge: float) -> Tensor:
    """`fitted_values` of a window, [batch, num_kv_heads, num_kept, head_dim] in float32."""
    values = window.values.float().transpose(1, 2)
    return _one_by_one(fitted_values, window.logits().flatten(2, 3), values, indices, ridge=ridge)


def key_shift(queries: Tensor, logits: Tensor, indices: Tensor, ridge: float) -> Tensor:
    """One vector for each head that, added to its kept keys, gives them the weight that the evicted ones had.

    Without it attention to the window shrinks to the share s of the weights that survive, and all else gains. A shift d
    adds the same to a query's logits on all kept keys, and exp(q.d) = 1 / s would undo the loss for that query.

    queries: [..., num_queries, head_dim], of all heads of a group
    logits:  [..., num_queries, num_tokens], scaled
    indices: [..., num_kept]
    returns  [..., 1, head_dim]
    """
    kept = _columns(logits.softmax(dim=-1), indices).sum(dim=-1, keepdim=True)
    lost = -kept.clamp(min=LEAST_KEPT).log()
    return ridge_solve(queries * queries.shape[-1] ** -0.5, lost, ridge).transpose(-1, -2)


def fitted_values(logits: Tensor, values: Tensor, indices: Tensor, ridge: float) -> Tensor:
    """Values for the kept keys with which the stored queries get from them what they got from the whole window.

    A shift that all kept keys share changes nothing here: it cancels in the softmax over them.

    logits:  [..., num_queries, num_tokens], scaled
    values:  [..., num_tokens, head_dim]
    indices: [..., num_kept]
    returns  [..., num_kept, head_dim]
    """
    before, after = logits.softmax(dim=-1) @ values, _columns(logits, indices).softmax(dim=-1)
    own = _rows(values, indices)
    return own + ridge_solve(after, before - after @ own, ridge)


def ridge_solve(rows: Tensor, targets: Tensor, ridge: float, steps: int = STEPS) -> Tensor:
    """The x that minimises |rows @ x - targets|^2 + r |x|^2, where r is `ridge` times the mean square of a column.

    By conjugate gradients from zero, every column of x by itself; exact after k steps, but for rounding.

    rows: [..., n, k]; targets: [..., n, m]; returns [..., k, m]
    """
    gram = rows.transpose(-1, -2) @ rows
    strength = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    residual = rows.transpose(-1, -2) @ targets
    solution, direction = torch.zeros_like(residual), residual
    square = residual.square().sum(dim=-2, keepdim=True)
    for _ in range(steps):
        image = gram @ direction + strength * direction
        length = _ratio(square, (direction * image).sum(dim=-2, keepdim=True))
        solution = solution + length * direction
        residual = residual - length * image
        before, square = square, residual.square().sum(dim=-2, keepdim=True)
        direction = residual + _ratio(square, before) * direction
    return solution


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is: a column that is solved has nowhere left to go."""
    return torch.where(b > 0, a / b, 0.0)


def _columns(matrix: Tensor, indices: Tensor) -> Tensor:
    return matrix.gather(-1, indices.unsqueeze(-2).expand(*matrix.shape[:-1], -1))


def _rows(matrix: Tensor, indices: Tensor) -> Tensor:
    return matrix.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, matrix.shape[-1]))


def _one_by_one(function, *tensors: Tensor, ridge: float) -> Tensor:  # type: ignore[no-untyped-def]
    """On the CPU one member of the batch at a time: see `Window.logits`."""
    if not tensors[0].is_cpu:
        return function(*tensors, ridge)
    return torch.stack([function(*member, ridge) for member in zip(*tensors, strict=True)])
