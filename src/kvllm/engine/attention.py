"""Attention layers under compression: their cache spec, and backends that see a request's physical length.

Keys are already rotated, and softmax does not depend on their order, so vLLM's kernels run unchanged on a shorter block
table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvllm import support
from kvllm.config import KvConfig
from kvllm.engine.spec import KvSpec
from kvllm.errors import UsageError
from kvllm.methods.attention import query_factor

Capture = Callable[[int, Tensor, Tensor, Tensor], None]
Store = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None"], None]


def compressed_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """The full-attention layers of the loaded model, by name. Local layers, recurrent layers and layers without a KV
    cache are left to vLLM.

    A sliding window of at least max_model_len is removed: the layer has full attention, but vLLM would put it into
    another KV cache group.
    Raises UsageError, with layer and reason, if any layer with a KV cache is not supported.
    """
    max_model_len = vllm_config.model_config.max_model_len
    sees_images = vllm_config.model_config.multimodal_config is not None
    found: dict[str, Attention] = {}
    every: Any = AttentionLayerBase
    for name, layer in get_layers_from_vllm_config(vllm_config, every).items():
        if support.is_recurrent_layer(layer):
            continue
        if type(layer) is not Attention and layer.get_kv_cache_spec(vllm_config) is None:
            continue
        for reason in support.layer_reasons(layer, max_model_len, sees_images):
            raise UsageError(f"KvLLM does not support layer {name} with {reason}.")
        if support.is_local_layer(layer, max_model_len):
            continue
        if layer.sliding_window is not None:
            layer.sliding_window = None
            layer.impl.sliding_window = (-1, -1) if isinstance(layer.impl.sliding_window, tuple) else -1
        found[name] = layer
    for reason in support.layers_reasons(found):
        raise UsageError(f"KvLLM does not support {reason}.")
    if not found:
        raise UsageError(f"KvLLM does not support {vllm_config.model_config.model}: {support.NO_FULL}.")
    return found


def in_part(config: KvConfig, part: int, layer_name: str) -> bool:
    """Whether a compressed layer belongs to this part (`KvConfig.parts`)."""
    return not config.budgets or extract_layer_index(layer_name) in config.budgets[part].layers


def compressed_spec(layer_name: str, spec: Any, config: KvConfig) -> Any:
    """Our spec with the fields of a full-attention layer's own; a sliding-window layer keeps its own spec.

    `compressed_layers` has checked the layers before vLLM asks for their specs. Chunked-attention layers have a class
    of their own, which does not call this.
    """
    if spec is None or type(spec) is SlidingWindowSpec:
        return spec
    if type(spec) is not FullAttentionSpec:
        raise UsageError(
            f"KvLLM does not support layer {layer_name} with {type(spec).__name__}: {support.SERVED_KINDS}."
        )
    part = next(part for part in range(len(config.parts)) if in_part(config, part, layer_name))
    return KvSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)}, part=part)


def capture_queries(layers: list[Any], capture: Capture, device: str) -> None:
    """Call `capture(layer_index, query, key, value)` with each layer's post-RoPE queries before its attention runs.

    query, key, value: [num_tokens, num_heads or num_kv_heads, head_dim], padded as the layer sees it. Methods scale
                       logits by head_dim ** -0.5; if the layer uses another factor, the query is multiplied by the
                       quotient
    Raises UsageError if a layer's backend is not supported. A layer raises it when it is called without keys, as models
    do that write the KV cache themselves.
    """
    for layer in layers:
        backend = layer.attn_backend.get_name()
        if backend not in support.BACKENDS[device]:
            raise UsageError(
                f"KvLLM does not support attention_backend={backend}: use one of {', '.join(support.BACKENDS[device])}."
            )
    for index, layer in enumerate(layers):
        layer.impl.forward = _capturing(
            layer.impl.forward, capture, index, query_factor(layer.impl.scale, layer.head_size)
        )


def _capturing(forward: Callable[..., Any], capture: Capture, index: int, factor: float | None) -> Callable[..., Any]:
    def capturing_forward(layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if key is None:
            raise UsageError(
                f"KvLLM does not support layer {layer.layer_name}: its model writes keys and values to the KV cache "
                "itself, so KvLLM cannot see them. Serve the model without KvLLM."
            )
        seen = query
        if factor is not None:  # fp8 tensors cannot be multiplied; bfloat16 represents every fp8 value exactly
            seen = (query.to(torch.bfloat16) if query.dtype.itemsize == 1 else query) * factor
        capture(index, seen, key, value)
        return forward(layer, query, key, value, *args, **kwargs)

    return capturing_forward


def store_with_queries(layers: list[Any], store: Store, device: str) -> None:
    """Let `store(layer_index, query, key, value, slot_mapping)` replace each layer's write to the KV cache.

    vLLM writes a step's keys and values before it passes the queries to attention. Here the write is deferred until
    then, so that one kernel stores all three. slot_mapping is None if the layer has nothing to write: in runs without a
    cache, and in layers that share another layer's. Otherwise as `capture_queries`.
    """
    writes = [_PendingWrite() for _ in layers]

    def capture(index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        store(index, query, key, value, writes[index].take())

    capture_queries(layers, capture, device)
    for layer, write in zip(layers, writes, strict=True):
        layer.impl.do_kv_cache_update = write.put_off


@dataclass
class _PendingWrite:
    """The slots of a layer's deferred write, between vLLM's two calls of the layer in one step."""

    slot_mapping: Tensor | None = None

    def put_off(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self.slot_mapping = slot_mapping

    def take(self) -> Tensor | None:
        slot_mapping, self.slot_mapping = self.slot_mapping, None
        return slot_mapping


def in_kernel_blocks(block_table: Tensor, blocks_per_block: int, out: Tensor | None = None) -> Tensor:
    """Convert a block table from allocator blocks to kernel blocks, `blocks_per_block` per allocator block.

    block_table: [num_reqs, num_blocks], block ids; out: [at least num_reqs, num_blocks * blocks_per_block]
    returns      [num_reqs, num_blocks * blocks_per_block]; the table itself if both block sizes are the same
    """
    if blocks_per_block == 1:
        return block_table
    num_reqs, num_blocks = block_table.shape
    parts = torch.arange(blocks_per_block, dtype=block_table.dtype, device=block_table.device)
    if out is None:
        out = block_table.new_empty(num_reqs, num_blocks * blocks_per_block)
    torch.add(
        parts, block_table.unsqueeze(-1), alpha=blocks_per_block, out=out[:num_reqs].unflatten(1, (num_blocks, -1))
    )
    return out[:num_reqs]


def kernel_block_backend(base: type[AttentionBackend], block_size: int) -> type[AttentionBackend]:
    """A subclass of `base` whose kernels use blocks of `block_size` tokens, however large the allocator's are."""

    class KernelBlockBackend(base):  # type: ignore[misc, valid-type]
        @classmethod
        def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
            return [block_size]

    return KernelBlockBackend


def shortening_backend(
    base: type[AttentionBackend], shorten: Callable[[CommonAttentionMetadata], CommonAttentionMetadata]
) -> type[AttentionBackend]:
    """A subclass of `base` whose metadata is built from `shorten(common_attn_metadata)`."""
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
