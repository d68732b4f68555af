"""Survivors that stand in for what was evicted: keys that win back its attention, values that win back its output.

Both are ridge regressions over the stored queries, for each layer and KV head by itself. They see attention inside the
window only, so they are exact for no query; the ridge keeps them near the survivors' own keys and values.

A few steps of preconditioned conjugate gradients solve them: what an exact solution would add lies where the queries
hardly look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvllm.methods.attended import Attended
from kvllm.methods.products import by_member, products

STEPS = 4  # of conjugate gradients, here and in the kernel
# Least ridge of the preconditioner, however weak that of the problem, here and in the kernel. With 1e-6, an unknown
# that few queries see would be scaled up so far that, once the queries are fitted, rounding errors lead the next step.
LEAST_DAMPING = 1.0
SMALLEST = torch.finfo(torch.float32).tiny  # a query that looks at no kept key at all gets nothing from them
LEAST_KEPT = 1e-3  # share of the weights: where less is kept, the shift is as if it were this


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """[batch, num_kv_heads, num_kept, head_dim] of tokens [batch, num_kv_heads, num_tokens, head_dim]."""
    return tokens.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, tokens.shape[-1]))


def refit(
    queries: Tensor, keys: Tensor, values: Tensor, attended: Attended, key_ridge: float, value_ridge: float
) -> tuple[Tensor, Tensor]:
    """The kept keys and values that stand in for a whole window.

    Without new keys, attention to the window would shrink to the share s of the weights that survive, and all else
    would gain. All keys of a head shift by one vector d, which adds the same to a query's logits on them all:
    exp(q.d) = 1 / s would undo the loss for that query.

    With the new values, the stored queries get from the survivors what they got from the whole window. The shift
    changes nothing here: it cancels in the softmax over the survivors.

    queries:      [batch, num_kv_heads, num_queries, head_dim], as of `attend`
    keys, values: [batch, num_kv_heads, num_kept, head_dim], the survivors' own
    attended:     what the queries see in the whole window
    ridges:       0: the keys, or the values, stay as they are
    """

    def equations(queries: Tensor, keys: Tensor, values: Tensor, outputs: Tensor, log_sums: Tensor) -> list[Tensor]:
        weights = (queries @ keys.transpose(-1, -2)).sub_(log_sums).exp_()  # with those of the evicted they sum to 1
        kept = weights.sum(dim=-1, keepdim=True)
        made: list[Tensor] = []
        if key_ridge > 0:
            made += normal_equations(queries, -kept.clamp(min=LEAST_KEPT).log())
        if value_ridge > 0:  # of what the values must change by
            gram, wanted = normal_equations(weights.div_(kept.clamp(min=SMALLEST)), outputs)
            made += gram, wanted - gram @ values
        return made

    found = by_member(equations, queries, keys, values, attended.outputs, attended.log_sums)
    if key_ridge > 0:
        keys = keys + ridge_solve(found[0], found[1], key_ridge).transpose(-1, -2)
    if value_ridge > 0:
        values = values + ridge_solve(found[-2], found[-1], value_ridge)
    return keys, values


def normal_equations(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """rows^T rows, [..., k, k], and rows^T targets, [..., k, m], of rows [..., n, k] and targets [..., n, m]."""
    columns = rows.transpose(-1, -2)
    return columns @ rows, columns @ targets


def ridge_solve(gram: Tensor, wanted: Tensor, ridge: float, steps: int = STEPS) -> Tensor:
    """The x that minimises |rows @ x - targets|^2 + r |x|^2, where r is `ridge` times the mean square of a column.

    By conjugate gradients from zero, every column of x by itself; exact after k steps, but for rounding. Preconditioned
    by the diagonal: survivors have weights of very different size, and few steps would leave the small ones unsolved.

    gram, wanted: `normal_equations` of rows and targets; overwritten
    returns       [..., k, m]
    """
    residual = wanted
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
