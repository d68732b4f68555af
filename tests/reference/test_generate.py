from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from kvllm.config import KvConfig
from kvllm.methods.base import Kept, Method
from kvllm.reference import generate
from kvllm.reference import request as request_module
from tests.reference.models import FAMILIES, text, tiny_model

CONFIG = KvConfig(window_size=32, buffer_size=12, query_stride=4, retention_ratio=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_compression_the_tokens_are_those_of_transformers(family):
    model, prompt = tiny_model(family), text(17)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, 17:].tolist()
    for config in (None, replace(CONFIG, retention_ratio=1.0)):
        result = generate(model, prompt, 60, config)
        assert result.token_ids == expected
        assert result.kept == [] and result.physical_len == 17 + 59  # the last token is never computed


def test_margins_are_the_gaps_between_the_two_best_logits():
    model, prompt = tiny_model("llama"), text(9)
    result = generate(model, prompt, 5)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + result.token_ids])).logits[0, 8:13]
    best = logits.sort(descending=True).values
    torch.testing.assert_close(torch.tensor(result.margins), best[:, 0] - best[:, 1], rtol=1e-4, atol=1e-4)


def test_the_tokens_are_the_same_until_the_first_event_and_after_it_not_all():
    model, prompt = tiny_model("qwen3"), text(17)
    full, compressed = generate(model, prompt, 200), generate(model, prompt, 200, CONFIG)
    first = 32 + 32 + 12 - 17 + 1  # tokens predicted before the step that starts with the event
    assert compressed.token_ids[:first] == full.token_ids[:first]
    assert compressed.token_ids != full.token_ids
    assert len(compressed.kept) == (216 - 32 - 12 - 1) // 32
    assert compressed.physical_len == 216 - len(compressed.kept) * 16


def test_generation_ends_with_the_end_of_text_token():
    model, prompt = tiny_model("llama"), text(9)
    free = generate(model, prompt, 30).token_ids
    eos = free[7]
    end = free.index(eos) + 1
    before = model.generation_config.eos_token_id
    try:
        for ids in (eos, [96, eos]):
            model.generation_config.eos_token_id = ids
            assert generate(model, prompt, 30).token_ids[-1] == eos
            assert len(generate(model, prompt, 30).token_ids) <= end
            assert generate(model, prompt, 30, ignore_eos=True).token_ids == free
    finally:
        model.generation_config.eos_token_id = before


def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="max_tokens=0"):
        generate(tiny_model("llama"), text(4), 0)
    with pytest.raises(ValueError, match="num_prompt_tokens=0"):
        generate(tiny_model("llama"), [], 4)


@dataclass(frozen=True)
class Merging(Method):
    """Keeps the first tokens, with keys and values that tell whose they are."""

    def score(self, window):
        return torch.zeros(window.keys.shape[0], window.num_kv_heads, window.num_tokens)

    def compress(self, window, num_kept):
        indices = self.select(self.score(window), num_kept)
        marks = (window.layers[:, None, None, None] + 1) * torch.ones_like(window.keys[:, :num_kept])
        return Kept(indices, keys=marks, values=-marks)


def test_merged_keys_and_values_take_the_place_of_the_survivors(monkeypatch):
    monkeypatch.setattr(request_module, "make_method", lambda config: Merging())
    request = request_module.Request(tiny_model("llama"), 16, CONFIG, block_size=16)
    request.step(text(60))
    raw = [(layer.keys[48:], layer.values[48:]) for layer in request.layers]
    request.step([1])
    for i, (layer, (keys, values)) in enumerate(zip(request.layers, raw, strict=True)):
        assert (layer.keys[16:32] == i + 1).all() and (layer.values[16:32] == -i - 1).all()
        assert torch.equal(layer.keys[32:-1], keys) and torch.equal(layer.values[32:-1], values)
