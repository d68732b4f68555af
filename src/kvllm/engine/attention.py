"""Attention layers under compression: their cache spec, and backends that see a request's physical length.

Keys carry their own rotation and softmax does not care about order, so vLLM's kernels run unchanged on a shorter
block table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvllm.engine.settings import BACKENDS
from kvllm.engine.spec import KvSpec

Capture = Callable[[int, Tensor], None]


def compressed_spec(layer_name: str, spec: Any) -> Any:
    """Our spec with the fields of a layer's own; ValueError where the layer is not plain full attention."""
    if spec is None:
        return None
    if type(spec) is not FullAttentionSpec:
        raise ValueError(
            f"KvLLM does not support layer {layer_name} with {type(spec).__name__}: all layers must be full attention."
        )
    return KvSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)})


def capture_queries(layers: list[Any], capture: Capture, device: str) -> None:
    """Hand each layer's post-RoPE queries to `capture(layer_index, query)` before its attention runs.

    query: [num_tokens, num_heads, head_dim], padded as the layer sees it
    Raises ValueError where a layer's backend is not one that compression supports.
    """
    for index, layer in enumerate(layers):
        backend = layer.attn_backend.get_name()
        if backend not in BACKENDS[device]:
            raise ValueError(
                f"KvLLM does not support attention_backend={backend}: use one of {', '.join(BACKENDS[device])}."
            )
        layer.impl.forward = _capturing(layer.impl.forward, capture, index)


def _capturing(forward: Callable[..., Any], capture: Capture, index: int) -> Callable[..., Any]:
    def capturing_forward(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        capture(index, query)
        return forward(layer, query, *args, **kwargs)

    return capturing_forward


def shortening_backend(
    base: type[AttentionBackend], shorten: Callable[[CommonAttentionMetadata], CommonAttentionMetadata]
) -> type[AttentionBackend]:
    """A backend like `base` whose metadata is built from `shorten(common_attn_metadata)`."""
    base_builder = base.get_builder_cls()

    class ShorteningBuilder(base_builder):  # type: ignore[misc, valid-type]
        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
        ) -> Any:
            return super().build(common_prefix_len, shorten(common_attn_metadata), *args, **kwargs)

    class ShorteningBackend(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_builder_cls() -> Any:
            return ShorteningBuilder

    return ShorteningBackend
