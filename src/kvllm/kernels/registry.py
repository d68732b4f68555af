"""Where a module of this package registers the kernels of a method; `kvllm.kernels.fused` looks them up."""

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


FUSED: dict[type[Method], tuple[Covers, Build]] = {}


def serves(method: type[Method], covers: Covers) -> Callable[[Build], Build]:
    """Decorator of a `Build`: these are the kernels of this class of methods."""

    def add(build: Build) -> Build:
        FUSED[method] = (covers, build)
        return build

    return add
