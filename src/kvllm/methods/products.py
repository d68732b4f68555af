"""Products of matrices whose rounding does not depend on what else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def products(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; on the CPU one member of the first axis at a time.

    There a batched product may round differently from one of fewer members, and would make what a request keeps depend
    on its batch. One member also stays in the core's own cache.

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
