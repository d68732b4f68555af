"""What the reference knows of a model's rotary embedding, against what the model does."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    DeepseekV2Config,
    Exaone4Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    SmolLM3Config,
    StableLmConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from kvllm.config import KvConfig
from kvllm.methods.kara import Kara
from kvllm.methods.rope import frequencies
from kvllm.reference import Request
from kvllm.reference.rope import rope_of
from tests.reference.models import FAMILIES, tiny_model

HEAD_DIM = 16
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def longrope(head_dim: int, original_len: int) -> dict[str, Any]:
    """Phi-3's, as options of its config: frequencies a quarter as high in texts of more than `original_len` tokens."""
    factors = {"short_factor": [1.0] * (head_dim // 2), "long_factor": [4.0] * (head_dim // 2)}
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original_len}
    return {"rope_parameters": parameters | factors, "original_max_position_embeddings": original_len}


def model_of(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


def rotated_by_the_model(model: PreTrainedModel, vectors: torch.Tensor, position: int) -> torch.Tensor:
    """The vectors [num_vectors, HEAD_DIM] as queries of the text's token number `position`, after the model's RoPE."""
    cos, sin = model.base_model.rotary_emb(vectors, torch.tensor([[position]]))
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    rotated, still = vectors.split([cos.shape[-1], vectors.shape[-1] - cos.shape[-1]], dim=-1)
    queries = rotated[None, :, None]  # [batch, num_heads, num_tokens, head_dim]
    return torch.cat([apply(queries, queries, cos, sin)[0][0, :, 0], still], dim=-1)


@pytest.mark.parametrize(
    "config, interleaved, num_pairs",
    [
        (LlamaConfig(**SIZES), False, 8),
        (LlamaConfig(**SIZES, rope_parameters=LLAMA3), False, 8),
        (LlamaConfig(**SIZES, rope_parameters=YARN), False, 8),
        (CohereConfig(**SIZES), True, 8),
        (GlmConfig(**SIZES, head_dim=HEAD_DIM, rope_parameters=HALF), True, 4),
        (PhiConfig(**SIZES, rope_parameters=HALF), False, 4),
        (StableLmConfig(**SIZES, rope_parameters=HALF | {"partial_rotary_factor": 0.25}), False, 2),
    ],
    ids=["llama", "llama3", "yarn", "cohere", "glm", "phi", "stablelm"],
)
def test_rotating_on_equals_the_model_s_rotation_at_a_later_position(config, interleaved, num_pairs):
    model = model_of(config)
    rope = rope_of(model)
    assert rope is not None and rope.interleaved == interleaved
    assert rope.frequencies.shape == (num_pairs,) and rope.frequencies.dtype == torch.float64
    vectors = torch.randn(5, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    for position, distance in ((0, 1), (7, 0), (30, 300), (500, -100)):
        rotation = rope.rotation(torch.tensor(distance), HEAD_DIM)
        before, expected = (rotated_by_the_model(model, vectors, p) for p in (position, position + distance))
        if "yarn" in str(config.rope_parameters):
            assert not torch.allclose(before.norm(dim=-1), vectors.norm(dim=-1))  # it also stretches, once
        # transformers computes angles of hundreds of radians in float32.
        torch.testing.assert_close(rotation.apply(before), expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_the_reference_have_plain_rope(family):
    model = tiny_model(family)
    rope = rope_of(model)
    assert rope is not None and not rope.interleaved
    # transformers holds them in float32.
    expected = frequencies(model.config.rope_parameters["rope_theta"], HEAD_DIM)
    torch.testing.assert_close(rope.frequencies, expected, rtol=1e-6, atol=0)


def test_models_without_rope_have_none():
    opt = OPTConfig(
        vocab_size=97, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2
    )
    for config in (opt, GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)):
        assert rope_of(model_of(config)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config, bases",
    [
        (SmolLM3Config(**(SIZES | {"num_hidden_layers": 4}), no_rope_layers=[1, 0, 0, 1]), [2e6, None, None, 2e6]),
        (Exaone4Config(**(SIZES | {"num_hidden_layers": 2}), sliding_window=64, sliding_window_pattern=2), [1e4, None]),
        (
            Gemma3TextConfig(
                **(SIZES | {"num_hidden_layers": 2}),
                head_dim=HEAD_DIM,
                layer_types=["sliding_attention", "full_attention"],
            ),
            [1e4, 1e6],
        ),
    ],
    ids=["smollm3", "exaone4", "gemma3"],
)
def test_every_layer_has_its_own(config, bases, dtype):
    rope = rope_of(model_of(config).to(dtype))
    assert rope is not None and rope.frequencies.shape == (len(bases), HEAD_DIM // 2)
    for row, base in zip(rope.frequencies, bases, strict=True):
        expected = torch.zeros_like(row) if base is None else frequencies(base, HEAD_DIM)
        # transformers holds them in float32, and in bfloat16 after `.to`.
        torch.testing.assert_close(row, expected, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=0)


def test_a_quarter_of_larger_heads_is_rotated_in_the_full_layers_of_gemma_4():
    """Beside embeddings of each layer, which need tokens where the probe has hidden states alone."""
    config = Gemma4TextConfig(
        **SIZES | {"num_hidden_layers": 2}, head_dim=HEAD_DIM, global_head_dim=2 * HEAD_DIM,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=SIZES["vocab_size"],
    )  # fmt: skip
    rope = rope_of(model_of(config), [1])
    assert rope is not None
    expected = frequencies(1e6, 2 * HEAD_DIM) * (torch.arange(HEAD_DIM) < HEAD_DIM // 4)
    torch.testing.assert_close(rope.frequencies, expected, rtol=1e-6, atol=0)


def test_frequencies_that_change_with_the_length_are_refused():
    longest = SIZES["max_position_embeddings"]
    assert rope_of(model_of(Phi3Config(**SIZES, **longrope(HEAD_DIM, longest)))) is not None
    model = model_of(Phi3Config(**SIZES, **longrope(HEAD_DIM, longest - 1)))
    with pytest.raises(ValueError, match="'longrope' changes .* of more than 4095 tokens, .* lookahead=0"):
        rope_of(model)


@pytest.mark.parametrize("method", ["expected_attention", "cask", "ams"])
def test_a_base_that_is_not_the_model_s_is_refused(method):
    """A method that is told `rope_theta` undoes plain RoPE of all dimensions, in every layer."""

    def start(config: Any, rope_theta: float) -> Request:
        options: dict[str, Any] = {"rope_theta": rope_theta}
        if method == "ams":
            options = {"base": "cask", "base_options": options}
        return Request(model_of(config), 5, KvConfig(method=method, method_options=options))

    start(LlamaConfig(**SIZES), 1e4)
    for config in (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        LlamaConfig(**SIZES, rope_parameters=YARN),
        CohereConfig(**SIZES),
        SmolLM3Config(**(SIZES | {"num_hidden_layers": 2}), no_rope_layers=[1, 0]),
    ):
        with pytest.raises(ValueError, match="rope_theta=10000.0: the model's rotary embedding differs"):
            start(config, 1e4)
    with pytest.raises(ValueError, match="rope_theta=10000.0: the model has no rotary embedding"):
        start(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2), 1e4)


def test_queries_that_are_rotated_in_part_at_their_end_are_refused():
    """DeepSeek-V2: no position in the first dimensions, and a rotation of the rest."""
    config = DeepseekV2Config(
        **SIZES, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = model_of(config)
    with pytest.raises(ValueError, match="DeepseekV2ForCausalLM: its rotary embedding .* method_options lookahead=0"):
        rope_of(model)
    assert not Kara(lookahead=0).uses_rope  # so that the advice helps
