"""Methods that have kernels of their own, which compress without dense copies of the candidates.

A module of this package registers what it has with `serves`; an engine asks `fused_kernels`, whatever its method is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvllm.compression.compressor import Fused
from kvllm.compression.query_bank import QueryBank
from kvllm.config import KvConfig
from kvllm.kernels.paged import PagedCache
from kvllm.methods.base import Method
from kvllm.methods.rope import Rope


class Build(Protocol):
    """Kernels that do exactly what this method does on these layers, or None where there are none."""

    def __call__(
        self, method: Method, config: KvConfig, bank: QueryBank, cache: PagedCache, rope: Rope | None
    ) -> Fused | None: ...


class Covers(Protocol):
    """Whether there are such kernels for heads of this size."""

    def __call__(self, method: Method, head_dim: int) -> bool: ...


_REGISTRY: dict[type[Method], tuple[Covers, Build]] = {}


def serves(method: type[Method], covers: Covers) -> Callable[[Build], Build]:
    """Decorator of a `Build`: these are the kernels of this class of methods."""

    def add(build: Build) -> Build:
        _REGISTRY[method] = (covers, build)
        return build

    return add


def _find(method: Method) -> tuple[Covers, Build] | None:
    from kvllm.kernels import kara  # noqa: F401  (registers itself; here, since importing it loads Triton's kernels)

    return _REGISTRY.get(type(method))


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
