"""How much device memory a model needs, from its config alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.groups import Groups, groups_of_model
from kvllm.layers import full_heads, local_layers
from kvllm.support import check_model, is_fp8

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
QUANTIZED_BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4}
# Default share, for the query bank, of the GPU memory that the weights leave free.
BANK_SHARE = 0.05


@dataclass(frozen=True)
class Footprint:
    """The device memory that a model needs, in bytes.

    kv_per_token: KV of one token in the layers of one KV cache group, of those that are compressed
    query_bank:   the queries that KvLLM stores
    groups:       the model's KV cache groups; by default all layers are in one group, which is compressed
    """

    weights: int
    kv_per_token: int
    query_bank: int
    groups: Groups = Groups(group_size=1)


def footprint(
    config: Any,
    compression: KvConfig,
    max_num_seqs: int,
    kv_cache_dtype: str = "auto",
    weights: int | None = None,
    max_model_len: int | None = None,
    language_model_only: bool = False,
) -> Footprint:
    """The footprint of the model with this config.

    config:        a transformers config
    compression:   with the layer budgets of the method, if it makes any (`kvllm.methods.with_budgets`)
    weights:       bytes; default: counted
    max_model_len: maximum text length, prompt included; default: the config's
    language_model_only: as in vLLM: prompts have no images, and what reads them is not loaded
    Raises UsageError for a model that KvLLM does not support.
    """
    import torch

    from kvllm.compression.query_bank import QueryBank

    check_model(config, config.model_type, max_model_len, sees_images=not language_model_only)
    dtype = dtype_of(config)
    text = config.get_text_config()
    longest = max_model_len or getattr(text, "max_position_embeddings", None)
    groups, heads = groups_of_model(text, longest, compression.budgets), full_heads(text)
    kv_bytes = 1 if is_fp8(kv_cache_dtype) else DTYPE_BYTES[dtype]
    bank = QueryBank.allocate(
        local_layers(text, longest).count(None), max_num_seqs, compression.num_queries, heads.num_heads,
        heads.num_kv_heads, heads.head_dim, compression.query_stride, getattr(torch, dtype), device="meta",
    )  # fmt: skip
    return Footprint(
        weights=weight_bytes(config, DTYPE_BYTES[dtype], language_model_only) if weights is None else weights,
        kv_per_token=2 * groups.group_size * heads.width() * kv_bytes,
        query_bank=bank.num_bytes,
        groups=groups,
    )


def dtype_of(config: Any) -> str:
    """The name of the model's dtype; config: a transformers config"""
    return str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")


def head_dim_of(config: Any) -> int:
    """Of the full-attention layers. config: for a multimodal model, the config of its language model"""
    return full_heads(config).head_dim


def default_max_num_seqs(memory: int, utilization: float, one: Footprint) -> int:
    """`vllm serve`'s default on a GPU of this size, or fewer if the bank is large. Ignores that it is 256 on an A100.

    memory: bytes; utilization: vLLM's --gpu-memory-utilization; one: the footprint with the query bank of one request
    """
    return min(1024 if memory >= 70 * 2**30 else 256, fitting_max_num_seqs(memory, utilization, one))


def fitting_max_num_seqs(memory: int, utilization: float, one: Footprint, num_shards: int = 1) -> int:
    """Requests whose query banks take at most BANK_SHARE of the memory that the weights leave free; a multiple of 8.

    memory:     of one device, in bytes
    one:        the footprint with the query bank of one request
    num_shards: devices over which weights and heads are sharded
    """
    left = memory * utilization - one.weights / num_shards
    return max(int(BANK_SHARE * left * num_shards / one.query_bank) // 8 * 8, 8)


def weight_bytes(config: Any, dtype_bytes: int, language_model_only: bool = False) -> int:
    """Bytes of the parameters, counted on a model without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    bits = quantized_bits(getattr(config, "quantization_config", None))
    if language_model_only:
        config = config.get_text_config()
    if bits and hasattr(config, "quantization_config"):
        config = copy.copy(config)
        del config.quantization_config  # the plain layers have the same shapes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dense = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    total = 0
    for parameter in model.parameters():  # yields tied weights once
        linear = parameter.dim() > 1 and id(parameter) not in dense
        total += parameter.numel() * (bits if bits and linear else 8 * dtype_bytes) // 8
    return total


def quantized_bits(quantization: Any) -> int | None:
    """Bits per element of quantized linear weights; None if the model is not quantized."""
    if not quantization:
        return None
    options = quantization if isinstance(quantization, dict) else quantization.to_dict()
    bits = options.get("bits") or QUANTIZED_BITS.get(str(options.get("quant_method")))
    if bits is None:
        raise UsageError(
            f"quantization {options.get('quant_method')!r}: the size of the weights does not follow from the config; "
            "pass it with --weights, such as --weights 8GiB."
        )
    return int(bits)
