"""Models that the engines' tests make themselves, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
