"""Layer budgets in the reference: each group of layers as if it had the ratio alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvllm.config import KvConfig
from kvllm.reference import Request, feed, generate
from tests.reference.models import text, tiny_model

CONFIG = KvConfig(window_size=64, buffer_size=32)
TEXT = text(260)


def after(config: KvConfig) -> Request:
    request = Request(tiny_model("llama"), 10, config, block_size=16)
    feed(request, TEXT)
    return request


def test_equal_ratios_are_one_ratio() -> None:
    model = tiny_model("llama")
    table, plain = ({"0": 0.5, "1": 0.5}, 0.5)
    answers = [
        generate(model, TEXT[:10], 200, replace(CONFIG, retention_ratio=r), ignore_eos=True) for r in (table, plain)
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_what_each_layer_keeps_of_the_first_window() -> None:
    """Until the first event all layers have seen the same, so each keeps what it keeps where all have its ratio."""
    request = after(replace(CONFIG, retention_ratio={"0": 0.75, "1": 0.25}))
    high, low = (after(replace(CONFIG, retention_ratio=ratio)) for ratio in (0.75, 0.25))
    assert request.num_events == 3 and len(request.kept) == 6
    assert torch.equal(request.kept[0][0], high.kept[0][0]) and torch.equal(request.kept[1][0], low.kept[0][1])
    lengths = [len(layer.keys) for layer in request.layers]
    assert lengths == [len(high.layers[0].keys), len(low.layers[1].keys)]
    assert request.physical_len == sum(lengths) // 2 == after(replace(CONFIG, retention_ratio=0.5)).physical_len


def test_prompts_are_cut_and_histories_limited_in_every_group() -> None:
    config = replace(CONFIG, retention_ratio={"0": 0.75, "1": 0.25}, prompt_budget=16, history_size=64)
    request = Request(tiny_model("llama"), 60, config, block_size=16)
    feed(request, TEXT)
    assert request.kept_prompt is not None and request.kept_prompt.shape[::2] == (2, 16)
    assert request.geometry is not None
    for group, layer in zip(request.geometry.groups, request.layers, strict=True):
        assert len(layer.keys) == group.physical_len(60, request.num_computed_tokens)


def test_a_table_for_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layers 2-3 are not among the model's full-attention layers, which are 0-1"):
        Request(tiny_model("llama"), 10, replace(CONFIG, retention_ratio={"0-1": 0.5, "2-3": 0.4}))


def test_a_method_s_own_budgets() -> None:
    config = replace(CONFIG, method="pyramidkv", retention_ratio=0.5, method_options={"beta": 2})
    request = after(config)
    assert request.config is not None and request.config.retention_ratio == {"0": 0.75, "1": 0.25}
    assert [kept.shape[-1] for kept in request.kept[:2]] == [48, 16]
