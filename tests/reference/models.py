"""Tiny random models of the families the reference is meant for, built from their configs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

VOCAB_SIZE = 97
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
FAMILIES = tuple(CONFIGS)


def tiny_config(family: str, **options: Any) -> Any:
    """Two layers, two KV heads of three query heads each."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,  # num_attention_heads * head_dim, since Qwen2 has no head_dim of its own
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # wide, so that attention is far from uniform and tokens far from ties
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return CONFIGS[family](**(sizes | options))


@functools.cache
def tiny_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family)).eval()


def text(num_tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
