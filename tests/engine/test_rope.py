"""vLLM's rotary embedding and that of transformers are told alike. Needs no engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CohereConfig, GlmConfig, LlamaConfig, PretrainedConfig, Qwen3Config, SmolLM3Config
from transformers.models.auto import AutoModelForCausalLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import Phi3LongRoPEScaledRotaryEmbedding

from kvllm.engine.rope import rope_of
from kvllm.reference.rope import rope_of as reference_rope_of
from tests.reference.test_rope import HALF, LLAMA3, SIZES, YARN

HEAD_DIM = 64
WIDE = SIZES | {"hidden_size": 2 * HEAD_DIM}


def rotary_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32, neox: bool = True) -> torch.nn.Module:
    """The module that a model of vLLM gets with this config."""
    parameters: dict[str, Any] = dict(config.rope_parameters)
    with set_current_vllm_config(VllmConfig()):
        return get_rope(HEAD_DIM, config.max_position_embeddings, neox, parameters, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config, interleaved",
    [
        (Qwen3Config(**WIDE, head_dim=HEAD_DIM), False),
        (LlamaConfig(**WIDE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}), False),
        (LlamaConfig(**WIDE, rope_parameters=LLAMA3), False),
        (LlamaConfig(**WIDE, rope_parameters=YARN), False),
        (LlamaConfig(**WIDE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), False),
        (CohereConfig(**WIDE), True),
        (GlmConfig(**WIDE, head_dim=HEAD_DIM, rope_parameters=HALF), True),
    ],
    ids=["qwen3", "llama", "llama3", "yarn", "linear", "cohere", "glm"],
)
def test_vllm_and_transformers_agree(config, interleaved, dtype):
    """Whatever dtype the engine runs in: its own table is rounded to that, and not asked."""
    expected = reference_rope_of(AutoModelForCausalLM.from_config(config))
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), rotary_of(config, dtype, neox=not interleaved)])
    actual = rope_of(layers)
    assert actual is not None and expected is not None
    assert actual.interleaved == expected.interleaved == interleaved
    assert actual.frequencies.dtype == torch.float64 and actual.frequencies.shape == expected.frequencies.shape
    torch.testing.assert_close(actual.frequencies, expected.frequencies, rtol=1e-6, atol=1e-7)


def test_layers_may_share_a_rope_or_have_equal_ones_but_no_others():
    one, other = LlamaConfig(**WIDE), LlamaConfig(**WIDE, rope_parameters=LLAMA3)
    assert rope_of(torch.nn.Linear(2, 2)) is None
    equal = torch.nn.ModuleList([rotary_of(one, torch.float32), rotary_of(one, torch.bfloat16)])
    assert equal[0] is not equal[1]
    rope = rope_of(equal)
    assert rope is not None and len(rope.frequencies) == HEAD_DIM // 2
    for second in (rotary_of(other), rotary_of(one, neox=False), rotary_of(GlmConfig(**WIDE, rope_parameters=HALF))):
        with pytest.raises(ValueError, match="layers of ModuleList have different rotary embeddings; .* lookahead=0"):
            rope_of(torch.nn.ModuleList([equal[0], second]))


def test_an_unknown_kind_is_refused():
    """Phi-3's long RoPE chooses its frequencies by the length of the text; only its class matters here."""
    long = object.__new__(Phi3LongRoPEScaledRotaryEmbedding)
    torch.nn.Module.__init__(long)
    with pytest.raises(ValueError, match="Phi3LongRoPE.* is not known; use method_options lookahead=0"):
        rope_of(torch.nn.ModuleList([long]))


def test_layers_without_rope_are_refused():
    config = LlamaConfig(**WIDE)
    model = torch.nn.ModuleList([rotary_of(config)])
    partial = SmolLM3Config(**WIDE, no_rope_layers=[1, 0])
    model.config = partial  # type: ignore[assignment]
    with pytest.raises(ValueError, match="some layers of ModuleList have no RoPE .*lookahead=0"):
        rope_of(model)
    with pytest.raises(ValueError, match="some layers of SmolLM3ForCausalLM have no RoPE"):
        reference_rope_of(AutoModelForCausalLM.from_config(partial))
    partial.no_rope_layers = [1, 1]
    assert rope_of(model) is not None
