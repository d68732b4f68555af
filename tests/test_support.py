"""Which models are served or refused, by their config alone."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from kvllm.support import check_model, has_mrope, model_reasons, packed_problem, packed_reasons


def config(model_type: str, **options: Any) -> Any:
    return AutoConfig.for_model(model_type, **({"max_position_embeddings": 512} | options))


LAYERS = ["sliding_attention", "full_attention"]
STATES = ["linear_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize(
    "made",
    [
        config("llama"),
        config("mistral", sliding_window=None),
        config("mistral", sliding_window=512),  # as long as the longest text
        config("qwen2", use_sliding_window=False, sliding_window=16),
        config("gemma3_text", sliding_window=1024, layer_types=LAYERS, num_hidden_layers=2),
        config("gemma3_text", sliding_window=64, layer_types=LAYERS, num_hidden_layers=2),
        config("gemma4_text", sliding_window=64),
        config("gemma4_text", sliding_window=64, use_bidirectional_attention="vision"),
        config("llama4_text", num_hidden_layers=4),
        config("gpt_oss"),
        config("falcon", alibi=False),
        config("gptj"),
        config("gpt2"),
        config("opt"),
        config("qwen2_5_vl"),
    ],
    ids=lambda made: made.model_type,
)
def test_served(made: Any) -> None:
    assert model_reasons(made, 512) == []


@pytest.mark.parametrize(
    "made, message",
    [
        (config("bloom"), "model_type=bloom: ALiBi"),
        (config("mpt"), "model_type=mpt: ALiBi"),
        (config("falcon", alibi=True), "model_type=falcon: ALiBi"),
        (config("t5"), "is_encoder_decoder=True: use a decoder-only model"),
        (config("biogpt"), "model_type=biogpt: its position encoding is not known"),
        (config("mistral", sliding_window=511), "sliding_window=511: .* max_model_len=512; use --max-model-len 511,"),
        (
            config("ministral", sliding_window=64, layer_types=LAYERS[:1] * 2, num_hidden_layers=2),
            "sliding_window=64: no layer has full attention, so there is nothing to compress with max_model_len=512",
        ),
        (
            config("gemma3_text", sliding_window=64, layer_types=[*LAYERS, LAYERS[1]], num_hidden_layers=3),
            "layer_types=2 full attention, 1 other: vLLM would split the full-attention layers into 2",
        ),
        (
            config("llama4_text", num_hidden_layers=2, layer_types=["chunked_attention"] * 2),
            "attention_chunk_size=8192: no layer has full attention",
        ),
        (
            config("llama4_text", sliding_window=64, num_hidden_layers=3, layer_types=[*LAYERS, "chunked_attention"]),
            "layer_types=chunked_attention, sliding_attention: only one of these",
        ),
        (
            config("gemma4_text", sliding_window=512),
            "per_layer_config=head_dim: these must be the same in all full-attention layers, and a window of at least "
            "max_model_len is full attention; use a --max-model-len longer than the window",
        ),
        (
            config("gemma4_text", num_hidden_layers=4, per_layer_config={1: {"hidden_size": 8}}),
            "per_layer_config=hidden_size: these must be the same in all layers",
        ),
        (
            config("gemma4_text", sliding_window=64, num_hidden_layers=6, per_layer_config={1: {"head_dim": 64}}),
            "per_layer_config=head_dim: these must be the same in all layers with a window",
        ),
        (
            config("gemma4_text", sliding_window=64, global_head_dim=384),
            "tensor_parallel_size=1: keys have 1536 numbers in full-attention layers and 1024 in the others, and one "
            "must be a multiple of the other; use another --tensor-parallel-size, or serve",
        ),
        (config("gemma4_text", num_kv_shared_layers=18), "num_kv_shared_layers=18: layers that share a KV cache"),
        (config("gemma4_text", use_bidirectional_attention="all"), "use_bidirectional_attention=all: all layers must"),
        (config("mamba2"), "layer_types=linear_attention: no layer has full attention"),
        (config("falcon_h1"), "layer_types=hybrid: supported layers are"),
        (
            config("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]),
            "layer_types=conv: supported layers",
        ),
        (
            config("qwen3_next", num_hidden_layers=3, full_attention_interval=None, layer_types=STATES),
            "layer_types=2 full attention, 1 other: vLLM would split the full-attention layers into 2",
        ),
        (
            config("gemma4_unified", text_config={"sliding_window": 64}),
            "use_mm_prefix=True: tokens of an image attend to later ones, .* use --language-model-only for text alone",
        ),
        (
            config("gemma3", text_config={"sliding_window": 64, "layer_types": LAYERS, "num_hidden_layers": 2}),
            "use_mm_prefix=True",
        ),
        (
            config("mimo_v2_flash", sliding_window=64),
            "head_size_v=128: keys and values must have the same head size, and that of the keys is 192",
        ),
        (config("deepseek_v3"), "kv_lora_rank=512: multi-head latent attention"),
        (config("gemma3n_text"), "num_kv_shared_layers=15: layers that share"),
        (config("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_refused_by_name(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"KvLLM does not support a model with {message}"):
        check_model(made, "a model", 512)


def test_text_alone_with_a_model_whose_images_see_later_tokens() -> None:
    made = config("gemma4_unified", text_config={"sliding_window": 64})
    assert model_reasons(made, 512, sees_images=False) == []
    made.text_config.use_bidirectional_attention = None
    assert model_reasons(made, 512) == []


def test_mrope_is_found_in_either_field() -> None:
    mrope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    assert has_mrope(config("qwen2_5_vl", text_config={"rope_parameters": mrope}))
    assert not has_mrope(config("llama"))


def test_larger_blocks_may_depend_on_the_devices_that_share_the_heads() -> None:
    """Two KV heads of 512 and six of 256; on six devices, one of each."""
    made = config(
        "gemma4_text", sliding_window=64, num_key_value_heads=6, num_attention_heads=12, head_dim=256,
        global_head_dim=512, num_global_key_value_heads=2, attention_k_eq_v=True,
    )  # fmt: skip
    (found,) = model_reasons(made, 512)
    assert "tensor_parallel_size=1: keys have 1024 numbers in full-attention layers and 1536 in the others" in found
    assert "tensor_parallel_size=2: keys have 512 numbers" in model_reasons(made, 512, num_shards=2)[0]
    assert model_reasons(made, 512, num_shards=6) == []


def test_a_window_counts_against_the_longest_text_that_is_asked_for() -> None:
    mistral = config("mistral", sliding_window=4096, max_position_embeddings=32768)
    assert model_reasons(mistral, 4096) == []
    assert len(model_reasons(mistral, 4097)) == 1
    assert len(model_reasons(mistral)) == 1  # of 32768 tokens, the model's own
    endless = SimpleNamespace(model_type="endless", rope_theta=1e4, sliding_window=64)
    endless.get_text_config = lambda: endless
    assert "max_model_len=unknown" in model_reasons(endless)[0]


@pytest.mark.parametrize(
    "backend, version, options, refused",
    [
        ("FLASH_ATTN", 2, {}, None),
        ("FLASH_ATTN", 3, {"sinks": [0.5], "logits_soft_cap": 50.0, "cache": "fp8"}, None),
        (
            "FLASH_ATTN",
            2,
            {"logits_soft_cap": 50.0},
            "logits_soft_cap=50.0: only supported with FlashAttention 3, not with 2",
        ),
        ("FLASH_ATTN", 4, {"sinks": [0.5]}, "sinks=learned: only supported with FlashAttention 3, not with 4"),
        ("FLASH_ATTN", 4, {"cache": "fp8"}, "kv_cache_dtype=fp8: only supported with FlashAttention 3, not with 4"),
        ("FLASH_ATTN", 3, {"head_size": 72}, "head_size=72"),
        ("FLASH_ATTN", 4, {"head_size": 512}, "head_size=512: not checked above 256; use survivor_bits=16"),
        ("TRITON_ATTN", None, {}, "attention_backend=TRITON_ATTN"),
    ],
)
def test_layers_whose_packed_survivors_cannot_be_merged(
    backend: str, version: int | None, options: dict[str, Any], refused: str | None
) -> None:
    impl = SimpleNamespace(
        vllm_flash_attn_version=version,
        sinks=options.get("sinks"),
        logits_soft_cap=options.get("logits_soft_cap", 0),
    )
    layer = SimpleNamespace(
        attn_backend=SimpleNamespace(get_name=lambda: backend),
        impl=impl,
        kv_cache_dtype=options.get("cache", "auto"),
        head_size=options.get("head_size", 64),
    )
    reasons = packed_reasons(layer)
    assert len(reasons) == (refused is not None)
    assert all(found.startswith(refused or "") for found in reasons)


def test_heads_whose_survivors_cannot_be_packed() -> None:
    assert packed_problem(4, "bfloat16", head_dim=80) is None
    assert "head_dim=72 is not a multiple of 16. Use survivor_bits=16" in str(
        packed_problem(4, "bfloat16", head_dim=72)
    )
    assert packed_problem(16, "bfloat16", head_dim=72) is None


def test_support_can_be_checked_without_vllm() -> None:
    check = "import sys, kvllm.support; assert not {'vllm', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
