from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvllm.config import KvConfig
from kvllm.reference import Request, feed, replay
from kvllm.reference import request as reference_request
from kvllm.reference.rope import rope_of
from tests.reference.models import text, tiny_config, tiny_model

CONFIG = KvConfig(window_size=32, buffer_size=12, query_stride=4, retention_ratio=0.5)


def test_a_fork_is_independent_of_the_request_it_was_made_from():
    model, token_ids = tiny_model("qwen3"), text(150)
    expected, full = replay(model, token_ids, 21, CONFIG), replay(model, token_ids, 21)
    request = Request(model, 21, max_queries=48)
    feed(request, token_ids, end=70)
    forks = [Request.fork(request, CONFIG), Request.fork(request, replace(CONFIG, method="recent"))]
    results = [feed(fork, token_ids) for fork in forks]
    for mine, theirs in zip(results[0].kept, expected.kept, strict=True):
        assert torch.equal(mine, theirs)
    # Matmuls of other shapes.
    torch.testing.assert_close(results[0].logprobs, expected.logprobs[70:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(feed(request, token_ids).logprobs, full.logprobs[70:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[1].logprobs, results[0].logprobs, atol=1e-4)


def test_what_cannot_be_forked_is_refused():
    model, token_ids = tiny_model("llama"), text(100)
    request = Request(model, 21, max_queries=16)
    feed(request, token_ids, end=60)
    with pytest.raises(ValueError, match="keeps 16 queries, not 44"):
        Request.fork(request, CONFIG)
    feed(request, token_ids, end=80)
    with pytest.raises(ValueError, match="80 computed tokens: past the first event"):
        Request.fork(request, CONFIG)
    with pytest.raises(ValueError, match="nothing to replay: the request is at token 80"):
        feed(request, token_ids, end=80)


def test_the_rotary_embedding_of_a_model_is_measured_once(monkeypatch):
    measured = Mock(wraps=rope_of)
    monkeypatch.setattr(reference_request, "rope_of", measured)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
        first, second = Request(model, 20, CONFIG), Request.fork(Request(model, 20, max_queries=44), CONFIG)
        assert first.rope is second.rope is not None
    assert measured.call_count == 2
