"""Matrix products whose rounding does not depend on the rest of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def by_member(function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`function(*tensors)`; on the CPU, one batch member at a time.

    On the CPU, the rounding of a batched product may depend on the batch size, so a request's survivors would depend on
    its batch. What a function computes on the way to its results also stays in the core's cache, member by member.

    tensors, and what is returned: [batch, ...]; the function must work with and without the batch dimension
    """
    if not tensors[0].is_cpu:
        return tuple(function(*tensors))
    members = [function(*member) for member in zip(*tensors, strict=True)]
    return tuple(torch.stack(results) for results in zip(*members, strict=True))


def products(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; on the CPU, one batch member at a time, as in `by_member`.

    a: [batch, ..., n, k]; b: [batch, ..., k, m]; returns [batch, ..., n, m]
    """
    if not a.is_cpu or a.ndim < 3:
        return a @ b
    if b.shape[-1] == 1:
        return (a * b.transpose(-1, -2)).sum(dim=-1, keepdim=True)
    made = torch.empty(*a.shape[:-1], b.shape[-1], dtype=a.dtype)
    for one, other, result in zip(a, b, made, strict=True):
        torch.matmul(one, other, out=result)
    return made
