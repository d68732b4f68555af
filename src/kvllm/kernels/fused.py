"""Looks up a method's fused kernels, which compress without dense copies of the candidates.

Modules of this package register them (`kvllm.kernels.registry`).
"""

from __future__ import annotations

from kvllm.compression.compressor import Fused
from kvllm.compression.query_bank import QueryBank
from kvllm.config import KvConfig
from kvllm.kernels.paged import PagedCache
from kvllm.kernels.registry import FUSED, Build, Covers
from kvllm.methods.base import Method
from kvllm.methods.rope import Rope


def _find(method: Method) -> tuple[Covers, Build] | None:
    from kvllm.kernels import kara  # noqa: F401  (registers itself; imported here because it imports Triton)

    return FUSED.get(type(method))


def has_fused_kernels(method: Method, head_dim: int) -> bool:
    """Whether `fused_kernels` will find kernels; known before the cache exists."""
    found = _find(method)
    return found is not None and found[0](method, head_dim)


def fused_kernels(
    method: Method, config: KvConfig, bank: QueryBank, cache: PagedCache, rope: Rope | None
) -> Fused | None:
    """Kernels that do exactly what the method does; None if there are none."""
    found = _find(method)
    if found is None or not found[0](method, cache.head_dim):
        return None
    return found[1](method, config, bank, cache, rope)
