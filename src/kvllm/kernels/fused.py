"""Methods that have kernels of their own, which compress without dense copies of the candidates.

A module of this package registers its kernels (`kvllm.kernels.registry`); an engine asks `fused_kernels`, whatever its
method is.
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
    from kvllm.kernels import kara  # noqa: F401  (registers itself; here, since importing it loads Triton's kernels)

    return FUSED.get(type(method))


def has_fused_kernels(method: Method, head_dim: int) -> bool:
    """Whether `fused_kernels` will find some: known before there is a cache."""
    found = _find(method)
    return found is not None and found[0](method, head_dim)


def fused_kernels(
    method: Method, config: KvConfig, bank: QueryBank, cache: PagedCache, rope: Rope | None
) -> Fused | None:
    """Kernels that do exactly what the method does, or None."""
    found = _find(method)
    if found is None or not found[0](method, cache.head_dim):
        return None
    return found[1](method, config, bank, cache, rope)
