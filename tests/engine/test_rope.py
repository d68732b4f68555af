"""The rotation of each layer's queries, as the engine measures it, and its answers against the reference's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    GlmConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)
from transformers.models.auto import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.models.transformers import base

from kvllm.config import KvConfig
from kvllm.engine.rope import rope_for
from kvllm.methods.rope import Rope
from kvllm.reference import load_model
from kvllm.reference.rope import rope_of as reference_rope_of
from tests.engine.conftest import BLOCK_SIZE, engine
from tests.models import VOCAB_SIZE, save_random_model
from tests.near_ties import check_greedy
from tests.reference.test_rope import HALF, LLAMA3, SIZES, YARN, longrope

HEAD_DIM, NUM_HEADS, HIDDEN_SIZE = 64, 2, 128
WIDE = SIZES | {"hidden_size": HIDDEN_SIZE}
KARA = KvConfig()


def rotary_of(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, neox: bool = True, max_model_len: int = 1024
) -> torch.nn.Module:
    """The rotary module that vLLM creates for this config."""
    parameters: dict[str, Any] = dict(config.rope_parameters)
    vllm_config = VllmConfig()
    vllm_config.model_config = SimpleNamespace(max_model_len=max_model_len)  # type: ignore[assignment]
    rotary_embedding._ROPE_DICT.clear()  # it does not tell engines with different longest texts apart
    with set_current_vllm_config(vllm_config, check_compile=False):
        return rotary_embedding.get_rope(HEAD_DIM, config.max_position_embeddings, neox, parameters, dtype)


class Core(torch.nn.Module):
    """Stands in for vLLM's attention layer; only its inputs matter."""

    num_heads, head_size = NUM_HEADS, HEAD_DIM

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        raise AssertionError("attention is not what is measured")


class Attention(torch.nn.Module):
    """An attention module as in vLLM's models, with any rotary embedding or none."""

    def __init__(self, rotary_emb: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.qkv_proj = torch.nn.Linear(HIDDEN_SIZE, 3 * NUM_HEADS * HEAD_DIM).to(dtype)
        self.rotary_emb = rotary_emb
        self.attn = Core()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.contiguous() for part in self.qkv_proj(hidden_states).chunk(3, dim=-1))
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(positions, query, key)
        return self.attn(query, key, value)


class LearnedPositions(Attention):
    """As in GPT-2: attention is not told the positions."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.attn(*self.qkv_proj(hidden_states).chunk(3, dim=-1))


class GivenAngles(Attention):
    """Its rotation depends on an argument whose value is unknown outside the model."""

    def forward(self, hidden_states: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.attn(*self.qkv_proj(hidden_states * freqs_cis).chunk(3, dim=-1))


class ByItself(Attention):
    """Rotates without using vLLM's rotary package."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        rotation = Rope(torch.full([HEAD_DIM // 2], 0.3, dtype=torch.float64)).rotation(positions[:, None], HEAD_DIM)
        return self.attn(rotation.apply(query.view(-1, NUM_HEADS, HEAD_DIM)).flatten(1), key, value)


def measured(
    *attentions: Attention, extra: torch.nn.Module | None = None, max_model_len: int = 1024, config: KvConfig = KARA
) -> Rope | None:
    """With a config whose method looks ahead, `rope_of` these layers."""
    model = torch.nn.ModuleList([*attentions, *([extra] if extra else [])])
    dtype = attentions[0].qkv_proj.weight.dtype
    model_config = SimpleNamespace(max_model_len=max_model_len, dtype=dtype, get_hidden_size=lambda: HIDDEN_SIZE)
    return rope_for(config, model, [attention.attn for attention in attentions], model_config, "cpu")


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
        (Phi3Config(**WIDE, **longrope(HEAD_DIM, 4096)), False),
    ],
    ids=["qwen3", "llama", "llama3", "yarn", "linear", "cohere", "glm", "phi3"],
)
def test_vllm_and_transformers_agree(config, interleaved, dtype):
    """Whatever dtype the engine runs in: its own table is rounded to that, and not asked."""
    expected = reference_rope_of(AutoModelForCausalLM.from_config(config))
    actual = measured(Attention(rotary_of(config, dtype, neox=not interleaved), dtype))
    assert actual is not None and expected is not None
    assert actual.interleaved == expected.interleaved == interleaved
    assert actual.frequencies.dtype == torch.float64 and actual.frequencies.shape == expected.frequencies.shape
    torch.testing.assert_close(actual.frequencies, expected.frequencies, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_may_share_a_rope_have_equal_ones_their_own_or_none(dtype):
    one = rotary_of(LlamaConfig(**WIDE), dtype)
    same = rotary_of(LlamaConfig(**(WIDE | {"max_position_embeddings": 2048})), dtype)
    other = rotary_of(LlamaConfig(**WIDE, rope_parameters=LLAMA3), dtype)
    assert one is not same
    shared = measured(*(Attention(rotary, dtype) for rotary in (one, one, same)))
    assert shared is not None and shared.frequencies.shape == (HEAD_DIM // 2,)
    apart = measured(*(Attention(rotary, dtype) for rotary in (one, None, other)))
    assert apart is not None and apart.frequencies.shape == (3, HEAD_DIM // 2)
    torch.testing.assert_close(apart.frequencies[0], shared.frequencies)
    assert not apart.frequencies[1].any() and not torch.allclose(apart.frequencies[2], shared.frequencies)


def test_only_layers_that_are_compressed_count():
    """A vision tower has rotary embeddings of its own (Qwen3-VL)."""
    one, other = rotary_of(LlamaConfig(**WIDE)), rotary_of(GlmConfig(**WIDE, rope_parameters=HALF), neox=False)
    alone, beside = measured(Attention(one)), measured(Attention(one), extra=Attention(other))
    assert alone is not None and beside is not None
    assert torch.equal(alone.frequencies, beside.frequencies) and alone.interleaved == beside.interleaved


def test_layers_without_positions_have_none():
    assert measured(LearnedPositions(None), LearnedPositions(None)) is None
    assert measured(Attention(None), extra=rotary_of(LlamaConfig(**WIDE))) is None


def test_what_is_not_known_is_refused():
    remedy = (
        "could not determine the rotary embedding of ModuleList .*; use method_options lookahead=0, or another method"
    )
    for attention in (ByItself(None), GivenAngles(None)):
        with pytest.raises(ValueError, match=remedy):
            measured(attention)
        with pytest.raises(ValueError, match="request_methods='tova,kara': kara: KvLLM " + remedy):
            measured(attention, config=KvConfig(method="random", request_methods="tova,kara"))
        assert measured(attention, config=KvConfig(method="random", request_methods="tova")) is None
    with pytest.raises(ValueError, match="pair the dimensions of their rotary embeddings differently"):
        halves = rotary_of(LlamaConfig(**WIDE)), rotary_of(LlamaConfig(**WIDE, rope_parameters=HALF))
        measured(*map(Attention, halves))


def test_phi3_s_long_rope_is_the_one_in_force():
    """vLLM chooses by the engine's longest text, once."""
    config = Phi3Config(**WIDE, **longrope(HEAD_DIM, 512))
    short, long = (
        measured(Attention(rotary_of(config, max_model_len=length)), max_model_len=length) for length in (512, 513)
    )
    assert short is not None and long is not None
    torch.testing.assert_close(short.frequencies, 4 * long.frequencies, rtol=1e-5, atol=0)


LAYERS_WITHOUT = {"no_rope_layers": [1, 0, 1, 0], "layer_types": ["full_attention"] * 4, "use_sliding_window": False}


@pytest.mark.engine
@pytest.mark.parametrize(
    "config_class, options, settings",
    [
        (SeedOssConfig, {}, {}),
        (SmolLM3Config, LAYERS_WITHOUT, {}),
        (LlamaConfig, {"rope_parameters": LLAMA3}, {"model_impl": "transformers"}),
        (LlamaConfig, {"rope_parameters": YARN}, {}),
        (GlmConfig, {"rope_parameters": HALF}, {}),
        (Phi3Config, longrope(64, 1024), {}),
    ],
    ids=["seed_oss", "smollm3", "llama_transformers", "yarn", "glm", "phi3"],
)
def test_an_engine_answers_as_the_reference(config_class, options, settings, tmp_path, monkeypatch) -> None:
    """With windows of 64 tokens whose survivors Kara chooses by queries that it rotates ahead."""
    check_engine(save_random_model(tmp_path, config_class, **options), monkeypatch, **settings)


def check_engine(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """An engine's greedy answers over several compressions are the reference's."""
    # vLLM's Transformers backend decorates the classes of transformers for good, to compile what runs eagerly here; the
    # reference could no longer make models of them.
    monkeypatch.setattr(base, "support_torch_compile", lambda **_: lambda cls: cls)
    config = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (33, 150)]
    params = SamplingParams(temperature=0, max_tokens=190, ignore_eos=True, detokenize=False)
    with engine(folder, config, skip_tokenizer_init=True, **settings) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    reference = load_model(folder)
    for prompt, output in zip(prompts, outputs, strict=True):
        check_greedy(reference, prompt, list(output.outputs[0].token_ids), config, BLOCK_SIZE)
