from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kvllm.config import KvConfig
from kvllm.methods import make_method
from kvllm.reference import Request, load_model
from kvllm.reference import attention as reference_attention
from kvllm.reference.attention import attention_with_extras
from kvllm.reference.request import check_model
from tests.reference.masked import masked_replay
from tests.reference.models import FAMILIES, text, tiny_config, tiny_model

WINDOW = KvConfig(window_size=32, buffer_size=12, query_stride=4, retention_ratio=0.5)
BUDGET = KvConfig(policy="budget", budget_size=32, budget_interval=16, window_size=16, buffer_size=8, query_stride=4)
# Float32 matmuls of another shape, through two layers.
CLOSE = 1e-4


def feed(request: Request, token_ids: list[int], sizes: list[int]) -> torch.Tensor:
    """Logits of the text, in steps of these sizes over and over, cut where an event asks for it."""
    logits, first, i = [], 0, 0
    while first < len(token_ids):
        size = min(sizes[i % len(sizes)], request.max_step() or len(token_ids))
        logits.append(request.step(token_ids[first : first + size]))
        first, i = first + size, i + 1
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[60], [1], [40, 1, 1, 7]])
def test_without_compression_the_logits_are_those_of_transformers(family, sizes):
    model, token_ids = tiny_model(family), text(60)
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0]
    request = Request(model, 20)
    actual = feed(request, token_ids, sizes)
    torch.testing.assert_close(actual, expected, rtol=CLOSE, atol=CLOSE)
    assert request.physical_len == 60 and request.kept == []
    assert model.config._attn_implementation == "sdpa"  # the model is left as it was


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method, options",
    [
        ("kara", {}),
        ("kara", {"bidirectional": False}),  # these two care which query lies where
        ("snapkv", {"num_observed": 2}),
        ("random", {}),
        ("streaming_llm", {}),
    ],
)
def test_a_window_compressed_equals_the_text_with_evicted_tokens_masked(family, method, options):
    config = replace(WINDOW, method=method, method_options=options)
    check_against_masked(family, config, 16, 21, 200, num_events=4)


@pytest.mark.parametrize("num_prompt_tokens", [1, 15, 16, 17, 48])
@pytest.mark.parametrize("buffer_size, query_stride", [(8, 8), (32, 1), (40, 4)])
def test_any_prompt_length_buffer_and_stride(num_prompt_tokens, buffer_size, query_stride):
    config = KvConfig(window_size=32, buffer_size=buffer_size, query_stride=query_stride, retention_ratio=0.25)
    protected_len = -(-num_prompt_tokens // 8) * 8
    num_tokens = protected_len + buffer_size + 3 * 32 + 1  # just past the third event
    check_against_masked("llama", config, 8, num_prompt_tokens, num_tokens, num_events=3)


@pytest.mark.parametrize("method", ["kara", "random", "streaming_llm"])
def test_a_budget_equals_the_text_with_evicted_tokens_masked(method):
    check_against_masked("qwen3", replace(BUDGET, method=method), 8, 21, 161, num_events=6)


@pytest.mark.parametrize("method, method_options", [("kara", {}), ("kara", {"bidirectional": False}), ("random", {})])
@pytest.mark.parametrize("history_size, history_kept", [(55, 32), (16, 8)])
def test_a_history_compressed_again_equals_the_text_with_evicted_tokens_masked(
    method, method_options, history_size, history_kept
):
    """Windows leave 16 tokens each. A limit of 48 is passed at every other event, one of 16 at every one."""
    config = replace(WINDOW, method=method, method_options=method_options, history_size=history_size)
    request = check_against_masked(
        "qwen3", config, 8, 21, 24 + 12 + 32 * 8 + 1, num_events=8, history_kept=history_kept
    )
    shapes = [k.shape[-1] for k in request.kept]
    assert shapes == ([16, 16, 16, 32, 16, 32, 16, 32] if history_size == 55 else [16] + [8] * 7)
    assert request.physical_len == 24 + history_kept + 12 + 1


@pytest.mark.parametrize("method", ["kara", "random", "snapkv", "streaming_llm"])
@pytest.mark.parametrize("sizes", [WINDOW, BUDGET], ids=["window", "budget"])
def test_a_prompt_that_is_cut_equals_the_text_with_evicted_tokens_masked(method, sizes):
    """61 tokens of prompt and 3 generated ones fill eight blocks, of which three stay."""
    config = replace(sizes, method=method, prompt_budget=24)
    request = check_against_masked("qwen3", config, 8, 61, 201, num_events=3 if sizes is WINDOW else 6)
    assert request.kept_prompt.shape == (2, 2, 24)


@pytest.mark.parametrize("num_prompt_tokens, cut", [(24, False), (25, True)])
def test_a_prompt_within_its_budget_is_left_alone(num_prompt_tokens, cut):
    request = check_against_masked("llama", replace(WINDOW, prompt_budget=24), 8, num_prompt_tokens, 125, num_events=2)
    assert (request.kept_prompt is not None) == cut


def test_casks_prompt_is_evicted_from_and_its_windows_are_merged():
    config = replace(WINDOW, method="cask", prompt_budget=32)
    request, token_ids = Request(tiny_model("llama"), 61, config, block_size=8), text(109)
    feed(request, token_ids[:108], [50])
    before = [(layer.keys, layer.values) for layer in request.layers]
    assert not request.kept
    request.step(token_ids[108:])
    assert request.kept_prompt is not None
    for i, (layer, (keys, values)) in enumerate(zip(request.layers, before, strict=True)):
        for head, kept in enumerate(request.kept_prompt[i]):
            assert {0, 32} <= set(kept.tolist())  # two anchors, a sixteenth of 32
            assert torch.equal(layer.keys[:32, head], keys[kept, head])
            assert torch.equal(layer.values[:32, head], values[kept, head])
            own = values[64 + request.kept[0][i, head], head]
            assert not torch.equal(layer.values[32:48, head], own)


def check_against_masked(family, config, block_size, num_prompt_tokens, num_tokens, num_events, history_kept=0):
    if config.method == "kara":  # a mask can evict, but not refit what stays
        config = replace(config, method_options=config.method_options | {"key_ridge": 0.0, "value_ridge": 0.0})
    model, token_ids = tiny_model(family), text(num_tokens)
    bounded = config.policy == "budget"
    num_candidates = config.budget_size + config.budget_interval if bounded else config.window_size
    logits, kept, of_prompt = masked_replay(
        model,
        token_ids,
        protected_len=-(-num_prompt_tokens // block_size) * block_size,
        method=make_method(config),
        num_candidates=num_candidates,
        num_kept=config.budget_size if bounded else int(config.retention_ratio * config.window_size),
        interval=config.budget_interval if bounded else config.window_size,
        buffer_size=config.buffer_size,
        query_span=config.window_size + config.buffer_size,
        query_stride=config.query_stride,
        bounded=bounded,
        history_limit=config.history_size,
        history_kept=history_kept,
        prompt_budget=config.prompt_budget,
    )
    request = Request(model, num_prompt_tokens, config, block_size)
    actual = feed(request, token_ids, [37, 1, 1])
    assert len(request.kept) == num_events
    for mine, theirs in zip(request.kept, kept, strict=True):
        assert torch.equal(mine, theirs)
    assert (request.kept_prompt is None) == (not of_prompt)
    if request.kept_prompt is not None:
        assert torch.equal(request.kept_prompt, torch.stack(of_prompt))
    torch.testing.assert_close(actual, logits, rtol=CLOSE, atol=CLOSE)
    if not config.history_size:
        cut = -(-num_prompt_tokens // block_size) * block_size - config.prompt_budget if of_prompt else 0
        assert request.physical_len == num_tokens - cut - sum(num_candidates - k.shape[-1] for k in request.kept)
    return request


def test_positions_follow_the_survivors():
    model, token_ids = tiny_model("llama"), text(150)
    request = Request(model, 16, replace(WINDOW, history_size=512), block_size=16)
    feed(request, token_ids, [50])
    assert len(request.kept) == 3
    for layer in range(2):
        for head in range(2):
            survivors = [16 + 32 * k + int(i) for k in range(3) for i in request.kept[k][layer, head]]
            (compressor,) = request._compressors
            assert compressor.positions is not None
            assert compressor.positions[0, layer, head, : len(survivors)].tolist() == survivors


def test_a_step_may_not_run_past_an_event():
    request = Request(tiny_model("llama"), 16, WINDOW, block_size=16)
    assert request.max_step() == 16 + 32 + 12
    with pytest.raises(ValueError, match="a step of 61 tokens: the next event allows 1 to 60"):
        request.step(text(61))
    with pytest.raises(ValueError, match="a step of 0 tokens"):
        request.step([])
    request.step(text(60))
    assert request.kept == [] and request.max_step() == 32  # due now, done when the next step starts
    request.step([1])
    assert len(request.kept) == 1 and request.max_step() == 31


def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="num_prompt_tokens=0"):
        Request(tiny_model("llama"), 0)
    with pytest.raises(ValueError, match="513 tokens: the model's context length is 512"):
        Request(tiny_model("llama"), 10).step(text(513))
    few = KvConfig(policy="budget", budget_size=16, budget_interval=16, window_size=64, buffer_size=8, query_stride=8)
    with pytest.raises(ValueError, match="window_size=64: .*only 32 are generated before the first cut"):
        Request(tiny_model("llama"), 10, few)


def test_models_with_other_layers_are_refused():
    qwen = tiny_config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM with sliding_window=16: no layer has full attention"):
        Request(type(tiny_model("qwen2"))(qwen), 4)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    mistral = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=16))
    with pytest.raises(ValueError, match="MistralForCausalLM with sliding_window=16: no layer has full attention"):
        check_model(mistral)
    check_model(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=None)))
    with pytest.raises(ValueError, match="BloomForCausalLM with model_type=bloom: ALiBi"):
        Request(BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)), 4)


def test_a_window_as_long_as_the_context_is_full_attention():
    options = {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0}
    model = type(tiny_model("qwen2"))(tiny_config("qwen2", **options)).eval()
    assert set(model.config.layer_types) == {"sliding_attention"}
    full = type(model)(tiny_config("qwen2")).eval()
    full.load_state_dict(model.state_dict())
    token_ids = text(200)
    actual, expected = (feed(Request(m, 20, WINDOW), token_ids, [90, 110]) for m in (model, full))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family, asked", [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_soft_caps_and_sinks_are_those_of_transformers(family, asked, monkeypatch):
    sizes = {"num_hidden_layers": 2, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    rest = {"max_position_embeddings": 512, "sliding_window": 512, "initializer_range": 0.3, "pad_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes, **heads, **rest), attn_implementation="eager"
    ).eval()
    token_ids = text(60)
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0]
    with_extras = Mock(wraps=attention_with_extras)
    monkeypatch.setattr(reference_attention, "attention_with_extras", with_extras)
    torch.testing.assert_close(feed(Request(model, 20), token_ids, [40, 1]), expected, rtol=CLOSE, atol=CLOSE)
    softcap, sinks = with_extras.call_args.args[5:]
    assert (softcap if asked == "softcap" else sinks) is not None


def test_a_layer_that_bypasses_the_cache_is_noticed():
    """A hybrid whose config does not say so: its second layer never calls the attention function."""
    model = type(tiny_model("llama"))(tiny_config("llama")).eval()
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(ValueError, match="layer 1 of LlamaForCausalLM has no KV cache of its own"):
        Request(model, 4).step(text(4))


def test_a_real_model(model_dir):
    """Stock logits through 30 layers, and a compression whose survivors stay where they were in the text."""
    model = load_model(model_dir)
    token_ids = torch.randint(1000, 40000, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(feed(Request(model, 20), token_ids, [90, 7]), expected, rtol=1e-4, atol=2e-3)
    request = Request(model, 20, WINDOW)
    actual = feed(request, token_ids, [100])
    assert [k.shape for k in request.kept] == [(30, 3, 16)]
    before_the_event = 32 + 32 + 12
    torch.testing.assert_close(actual[:before_the_event], expected[:before_the_event], rtol=1e-4, atol=2e-3)
    assert not torch.allclose(actual[before_the_event:], expected[before_the_event:], atol=0.1)
