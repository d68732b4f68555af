"""Model shapes: a folder with only a config.json, for which vLLM generates random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# gpt-oss-20b: every other layer has a sliding window of 128 tokens.
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "torch_dtype": "bfloat16",
    "vocab_size": 201088,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 199998,
    "eos_token_id": 200002,
}  # fmt: skip

# Qwen3-Next-80B-A3B with half of its layers and a quarter of its experts: three of four layers are gated delta nets.
QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "head_dim": 256,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rope_theta": 10000000,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": QWEN3 | _sizes(2048, 6144, 28, 16) | {"tie_word_embeddings": True},
    "qwen3-8b": QWEN3 | _sizes(4096, 12288, 36, 32),
    "qwen3-14b": QWEN3 | _sizes(5120, 17408, 40, 40),
    "qwen3-32b": QWEN3 | _sizes(5120, 25600, 64, 64),
    "gpt-oss-20b": GPT_OSS | _sizes(2880, 2880, 24, 64),
    "qwen3-next-24l": QWEN3_NEXT | _sizes(2048, 5120, 24, 16),
    "smollm2-135m": LLAMA | _sizes(576, 1536, 30, 9) | {"vocab_size": 49152, "num_key_value_heads": 3},
    "tiny": LLAMA | _sizes(128, 256, 2, 4) | {"vocab_size": 512, "num_key_value_heads": 2},
}


def write_shape(name: str, folder: Path) -> Path:
    """Write `SHAPES[name]` as a model folder without weights or tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name], indent=2))
    return folder
