"""Models that the engines' tests make themselves, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 2048


def save_random_llama(folder: Path, num_heads: int) -> Path:
    """A float32 Llama with heads of 64, two KV heads, and no tokenizer: its folder, which vLLM loads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64 * num_heads, intermediate_size=128 * num_heads, num_hidden_layers=4,
        num_attention_heads=num_heads, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        initializer_range=0.08, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_random_model(folder: Path, config_class: type, **options: Any) -> Path:
    """A float32 model of any family with four layers, two KV heads of two heads of 64 each, and no tokenizer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.08,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config_class(**(sizes | options))).save_pretrained(folder)
    return folder
