"""Matrix products whose rounding does not depend on the rest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def products(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; on the CPU, one batch member at a time.

    On the CPU, the rounding of a batched product may depend on the batch size, so a request's survivors would depend on
    its batch. One member at a time also fits in the core's cache.

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
