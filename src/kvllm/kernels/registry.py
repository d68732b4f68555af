"""The registry of methods' fused kernels, in which `kvllm.kernels.fused` looks them up."""

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
    """Returns kernels that do exactly what this method does on these layers; None if there are none."""

    def __call__(
        self, method: Method, config: KvConfig, bank: QueryBank, cache: PagedCache, rope: Rope | None
    ) -> Fused | None: ...


class Covers(Protocol):
    """Whether there are such kernels for this head_dim."""

    def __call__(self, method: Method, head_dim: int) -> bool: ...


FUSED: dict[type[Method], tuple[Covers, Build]] = {}


def serves(method: type[Method], covers: Covers) -> Callable[[Build], Build]:
    """Decorator that registers a `Build` for this class of methods."""

    def add(build: Build) -> Build:
        FUSED[method] = (covers, build)
        return build

    return add
