"""Survivors that stand in for what was evicted: keys that win back its attention, values that win back its output.

Both are ridge regressions over the stored queries, for each layer and KV head by itself. They see attention inside the
window only, so they are exact for no query; the ridge keeps them near the survivors' own keys and values.

A few steps of preconditioned conjugate gradients solve them: what an exact solution would add lies where the queries
hardly look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvllm.methods.base import Window
from kvllm.methods.products import products

STEPS = 4  # of conjugate gradients, here and in the kernel
# Least ridge of the preconditioner, however weak that of the problem, here and in the kernel. With 1e-6, an unknown
# that few queries see would be scaled up so far that, once the queries are fitted, rounding errors lead the next step.
LEAST_DAMPING = 1.0
SMALLEST = torch.finfo(torch.float32).tiny  # a query that looks at no kept key at all gets nothing from them
LEAST_KEPT = 1e-3  # share of the weights: where less is kept, the shift is as if it were this


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """[batch, num_kv_heads, num_kept, head_dim] of tokens [batch, num_kv_heads, num_tokens, head_dim]."""
    return _rows(tokens, indices)


def shift_keys(window: Window, indices: Tensor, ridge: float) -> Tensor:
    """`key_shift` of a window's kept keys, [batch, num_kv_heads, 1, head_dim] in float32."""
    return key_shift(window.scaled_queries, window.weights.flatten(2, 3), indices, ridge)


def refit_values(window: Window, indices: Tensor, ridge: float) -> Tensor:
    """`fitted_values` of a window, [batch, num_kv_heads, num_kept, head_dim] in float32."""
    return fitted_values(window.weights.flatten(2, 3), window.head_values, indices, ridge)


def key_shift(queries: Tensor, weights: Tensor, indices: Tensor, ridge: float) -> Tensor:
    """One vector for each head that, added to its kept keys, gives them the weight that the evicted ones had.

    Without it attention to the window shrinks to the share s of the weights that survive, and all else gains. A shift d
    adds the same to a query's logits on all kept keys, and exp(q.d) = 1 / s would undo the loss for that query.

    queries: [..., num_queries, head_dim], of all heads of a group, scaled: their products with keys are logits
    weights: [..., num_queries, num_tokens], of each query on the window's keys; they sum to 1
    indices: [..., num_kept]
    returns  [..., 1, head_dim]
    """
    kept = _columns(weights, indices).sum(dim=-1, keepdim=True)
    lost = -kept.clamp(min=LEAST_KEPT).log()
    return ridge_solve(queries, lost, ridge).transpose(-1, -2)


def fitted_values(weights: Tensor, values: Tensor, indices: Tensor, ridge: float) -> Tensor:
    """Values for the kept keys with which the stored queries get from them what they got from the whole window.

    A shift that all kept keys share changes nothing here: it cancels in the softmax over them.

    weights: [..., num_queries, num_tokens], of each query on the window's keys; they sum to 1
    values:  [..., num_tokens, head_dim]
    indices: [..., num_kept]
    returns  [..., num_kept, head_dim]
    """
    kept = _columns(weights, indices)
    after = kept / kept.sum(dim=-1, keepdim=True).clamp(min=SMALLEST)  # the softmax over the kept keys alone
    own = _rows(values, indices)
    return own + ridge_solve(after, products(weights, values) - products(after, own), ridge)


def ridge_solve(rows: Tensor, targets: Tensor, ridge: float, steps: int = STEPS) -> Tensor:
    """The x that minimises |rows @ x - targets|^2 + r |x|^2, where r is `ridge` times the mean square of a column.

    By conjugate gradients from zero, every column of x by itself; exact after k steps, but for rounding. Preconditioned
    by the diagonal: survivors have weights of very different size, and few steps would leave the small ones unsolved.

    rows: [..., n, k]; targets: [..., n, m]; returns [..., k, m]
    """
    columns = rows.transpose(-1, -2)
    gram, residual = products(columns, rows), products(columns, targets)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    inverse = _ratio(mean, diagonal + max(ridge, LEAST_DAMPING) * mean).unsqueeze(-1)  # at most 1: nothing overflows
    diagonal += ridge * mean
    solution, direction = torch.zeros_like(residual), inverse * residual
    square = (residual * direction).sum(dim=-2, keepdim=True)
    for step in range(steps):
        image = products(gram, direction)
        length = _ratio(square, (direction * image).sum(dim=-2, keepdim=True))
        solution.addcmul_(length, direction)
        if step + 1 == steps:
            break
        residual.addcmul_(length, image, value=-1)
        scaled = inverse * residual
        before, square = square, (residual * scaled).sum(dim=-2, keepdim=True)
        direction.mul_(_ratio(square, before)).add_(scaled)
    return solution


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, or 0 if b is 0: a converged column needs no further step."""
    return torch.where(b > 0, a / b, 0.0)


def _columns(matrix: Tensor, indices: Tensor) -> Tensor:
    return matrix.gather(-1, indices.unsqueeze(-2).expand(*matrix.shape[:-1], -1))


def _rows(matrix: Tensor, indices: Tensor) -> Tensor:
    return matrix.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, matrix.shape[-1]))
