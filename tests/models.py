"""Models that the engines' tests make themselves, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

VOCAB_SIZE = 2048
# What `save_random_model` needs for mixtures of experts: Qwen3-MoE's shape, GLM-4.5's and gpt-oss's.
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
GLM_EXPERTS: dict[str, Any] = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, use_qk_norm=True, partial_rotary_factor=0.5,
)  # fmt: skip
GPT_OSS_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128}
# What it needs for models with recurrent layers, whose states take as much as some hundred tokens of attention.
GRANITE_HYBRID: dict[str, Any] = dict(
    layer_types=["mamba", "mamba", "mamba", "attention"], num_local_experts=0, shared_intermediate_size=256,
    mamba_n_heads=8, mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=64,
    attention_multiplier=0.125, max_position_embeddings=2048,
)  # fmt: skip
QWEN3_NEXT: dict[str, Any] = EXPERTS | dict(
    linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=4, linear_num_value_heads=8,
    full_attention_interval=2, shared_expert_intermediate_size=128,
)  # fmt: skip
VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")  # their ids are 1 to 4
IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = 1, 2, 3, 4


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


def random_vision_model(kind: str) -> PreTrainedModel:
    """A float32 "qwen2_5_vl" or "qwen3_vl", whose language model has the sizes of `save_random_model`."""
    text: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.08, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    )  # fmt: skip
    vision: dict[str, Any] = dict(depth=2, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=256)
    ids = dict(
        image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )  # fmt: skip
    torch.manual_seed(0)
    config: Any
    if kind == "qwen3_vl":
        text["rope_parameters"] |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        config = Qwen3VLConfig(text_config=text | {"head_dim": 64}, vision_config=vision, **ids)
    else:
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [1]}, **ids)
    return AutoModelForImageTextToText.from_config(config).float().eval()


def save_random_vision_model(folder: Path, kind: str) -> Path:
    """`random_vision_model` with its image processor and a tokenizer of words; needs torchvision."""
    import transformers

    model = random_vision_model(kind)
    model.save_pretrained(folder)
    if kind == "qwen3_vl":
        processor, video = transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor
    else:
        processor, video = transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor
    words = {word: i for i, word in enumerate(["<|end|>", *VISION_TOKENS])}
    words |= {f"word{i}": i for i in range(len(words), VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word9")), eos_token="<|end|>", pad_token="<|end|>",
        additional_special_tokens=list(VISION_TOKENS),
    )  # fmt: skip
    patch = model.config.vision_config.patch_size
    patches = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    sizes = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}  # 1 to 64 tokens
    processor(
        image_processor=transformers.Qwen2VLImageProcessor(**patches, size=sizes), tokenizer=tokenizer,
        video_processor=video(**patches, size=sizes),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_small_chat_model(folder: Path) -> Path:
    """`save_random_llama` of four heads with a tokenizer of words, so that a server takes text and stop strings."""
    save_random_llama(folder, num_heads=4)
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder
