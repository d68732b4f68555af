"""What holds for every method, by name: a new one is tested by being registered."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from kvllm.config import KvConfig
from kvllm.methods import all_options, make_method, methods, resolved
from kvllm.methods.base import top_k
from kvllm.methods.kara import Kara
from tests.methods.windows import one_of, random_window, tensors_of


@pytest.fixture(params=["kara", "random", "snapkv", "streaming_llm"])
def method(request):
    return make_method(KvConfig(method=request.param))


def test_the_companions_are_registered():
    assert {"kara", "random", "snapkv", "streaming_llm"} <= set(methods())


@pytest.mark.parametrize("num_kv_heads, group_size", [(1, 1), (3, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("num_kept", [1, 7, 23, 24])
def test_exactly_num_kept_distinct_ascending(method, num_kept, num_kv_heads, group_size):
    window = random_window(num_kv_heads=num_kv_heads, group_size=group_size)
    indices = method.compress(window, num_kept).indices
    assert indices.dtype == torch.int64
    assert indices.shape == (2, num_kv_heads, num_kept)
    assert (indices.diff(dim=-1) > 0).all()
    assert indices.min() >= 0 and indices.max() < window.num_tokens


def test_scores_have_the_promised_shape_and_type(method):
    window = random_window(dtype=torch.bfloat16)
    scores = method.score(window)
    assert scores.dtype == torch.float32
    assert scores.shape == (2, 2, window.num_tokens)
    assert not scores.isnan().any()


@pytest.mark.parametrize("num_tokens, num_queries, head_dim", [(24, 5, 8), (256, 32, 64), (33, 5, 16)])
def test_a_batch_equals_its_members_bit_for_bit(method, num_tokens, num_queries, head_dim):
    window = random_window(batch=5, num_tokens=num_tokens, num_queries=num_queries, head_dim=head_dim)
    scores, kept = method.score(window), method.compress(window, 9).indices
    for i in range(5):
        torch.testing.assert_close(method.score(one_of(window, i)), scores[i : i + 1], rtol=0, atol=0)
        assert torch.equal(method.compress(one_of(window, i), 9).indices, kept[i : i + 1])


def test_the_input_is_left_alone(method):
    window = random_window()
    before = tensors_of(window)
    method.compress(window, 5)
    for name, tensor in tensors_of(window).items():
        assert torch.equal(tensor, before[name]), name


def test_a_method_is_frozen(method):
    name = fields(method)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(method, name, 1)


def test_top_k_gives_equals_to_the_earlier():
    scores = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0, 1.0]]])
    assert top_k(scores, 2).tolist() == [[[1, 2]]]
    assert top_k(scores, 4).tolist() == [[[0, 1, 2, 3]]]
    assert top_k(torch.zeros(1, 1, 300), 40).tolist() == [[list(range(40))]]


@pytest.mark.parametrize("name", ["ams", "cask", "chunkkv"])
def test_a_method_on_a_base_needs_what_its_base_needs(name):
    """Without the model's RoPE, kara would score as for a model that has none."""
    for base, options, needed in (("kara", {}, True), ("kara", {"lookahead": 0}, False), ("keydiff", {}, False)):
        on_base = make_method(KvConfig(method=name, method_options={"base": base, "base_options": options}))
        assert on_base.uses_rope == needed


@pytest.mark.parametrize("options", [{}, {"method_options": {"attention_floor": 3.0}}, {"method": "cask"}])
def test_what_a_measurement_records_makes_the_same_method(options):
    config = KvConfig(**options)
    recorded = json.loads(json.dumps(resolved(config)))
    assert all_options(make_method(KvConfig.from_dict(recorded))) == all_options(make_method(config))
    kara = recorded["method_options"]
    if config.method == "cask":
        assert kara["base"] == "kara"
        kara = kara["base_options"]
    assert kara["attention_floor"] == config.method_options.get("attention_floor", Kara().attention_floor)
    assert kara["lookahead"] == Kara().lookahead
