"""Properties of every method, by name: a new one is tested by being registered."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.methods import SHARED_OPTIONS, all_options, make_method, methods, resolved
from kvllm.methods.base import top_k
from kvllm.methods.kara import Kara
from kvllm.options import Option, options_of
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


def test_top_k_breaks_ties_in_favour_of_the_earlier():
    scores = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0, 1.0]]])
    assert top_k(scores, 2).tolist() == [[[1, 2]]]
    assert top_k(scores, 4).tolist() == [[[0, 1, 2, 3]]]
    assert top_k(torch.zeros(1, 1, 300), 40).tolist() == [[list(range(40))]]
    assert top_k(torch.tensor([[1.0, -torch.nan, torch.nan, -torch.inf]]), 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_top_k_is_a_stable_sort_cut_off(rounded):
    """Of both signs and both zeros, infinities included."""
    scores = 3 * torch.randn(4, 3, 200, generator=torch.Generator().manual_seed(0))
    scores = scores.round() if rounded else scores
    scores[0, :, ::7], scores[0, :, 1::7], scores[1, :, ::5] = torch.inf, -torch.inf, -0.0
    for num_kept in (0, 1, 31, 199, 200):
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_kept]
        assert torch.equal(top_k(scores, num_kept), order.sort(dim=-1).values)
        assert torch.equal(top_k(scores.transpose(0, 1), num_kept), order.sort(dim=-1).values.transpose(0, 1))


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


# Values that are of no use to an option of this type, though Python could convert or would accept some of them.
WRONG_TYPES: dict[Any, list[Any]] = {
    int: ["4", True, 4.0, 2.5, math.nan, None, [4]],
    float: ["0.5", True, math.nan, math.inf, -math.inf, None, [0.5]],
    bool: ["false", 0, 1.0, None],
    str: [3, True, None, ["a"]],
    Mapping: [3, "x", ["a"], None, {1: 2}],
}


def wrong_types() -> list[Any]:
    """(method, option, value) for every option of every method."""
    found = []
    for method, cls in methods().items():
        for name, hint in get_type_hints(cls).items():
            kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
            kind = get_origin(kinds[0]) or kinds[0]
            values = WRONG_TYPES[str if kind is Literal else kind]
            found += [(method, name, value) for value in values if value is not None or NoneType not in kinds]
    return found


@pytest.mark.parametrize("method, name, value", wrong_types())
def test_every_option_of_every_method_refuses_other_types_by_name(method, name, value):
    with pytest.raises(UsageError) as error:
        make_method(KvConfig(method=method, method_options={name: value}))
    message = str(error.value)
    assert message.startswith(f"method_options of {method}: {name}={value!r}: must be ") and "\n" not in message
    assert options_of(methods()[method])[name].accepts in message


# A value just outside the bounds of an option; `out_of_range` finds one for options that are not listed.
OUT_OF_RANGE = {
    "anchor_share": 0.51, "attention_floor": -1, "beta": 0.5, "chunk_fill": 1, "chunk_length": 0, "core_share": 0.51,
    "decay": 0, "epsilon": -0.1, "execution_above": -0.1, "execution_share": 1.1, "first_mass": 1.1, "gamma": -1,
    "importance_weight": -0.1, "kernel_size": 2, "key_ridge": -1,
    "keydiff_power": 16.1, "lookahead": -1, "max_chunk_size": 0, "max_gap": 0, "max_segment": 0,
    "min_quota": -1, "min_segment": 0, "num_groups": 5, "over_queries": "median", "segment_size": 0,
    "sparsity_cut": -0.1, "transition_above": -0.1, "transition_share": 1.1,
    "min_similarity": 1.1, "moment": "median", "num_future_tokens": 0, "num_observed": 0, "num_sink_tokens": -1,
    "rope_theta": 1, "segment_mass": 1.1, "similarity_threshold": -1.1, "value_ridge": 2e6, "variant": "papre",
}  # fmt: skip
UNBOUNDED = {"a string", "true or false", "a mapping of names to values", "an integer"}


def out_of_range(option: Option) -> Any:
    if option.name in OUT_OF_RANGE:
        return OUT_OF_RANGE[option.name]
    lower = re.search(r"(?:>=? |in [\[(])(-?[\d.]+)", option.accepts)
    return float(lower[1]) - 1 if lower and "a number" in option.accepts else int(lower[1]) - 1 if lower else "no such"


BOUNDED = [(m, o.name) for m, cls in methods().items() for o in options_of(cls).values() if o.accepts not in UNBOUNDED]


@pytest.mark.parametrize(
    "accepts, value",
    [("a number in [1, 100]", 0.0), ("an integer >= 0", -1), ("a number > -2.5", -3.5), ("'pre' or 'post'", "no such")],
)
def test_a_new_option_needs_no_entry_here(accepts, value):
    found = out_of_range(Option("new", "", "number", accepts, ""))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("method, name", BOUNDED)
def test_every_bounded_option_refuses_what_is_out_of_range_by_name(method, name):
    value = out_of_range(options_of(methods()[method])[name])
    with pytest.raises(UsageError) as error:
        make_method(KvConfig(method=method, method_options={name: value}))
    assert str(error.value).startswith(f"method_options of {method}: {name}={value!r}: must be ")


@pytest.mark.parametrize("method", methods())
def test_every_method_refuses_an_unknown_option_by_name(method):
    with pytest.raises(UsageError) as error:
        make_method(KvConfig(method=method, method_options={"colour": "red"}))
    assert str(error.value).startswith(f"method_options of {method}: colour='red': no such option; options are ")
    for name in options_of(methods()[method]):
        with pytest.raises(UsageError, match=f"{name}x=1: no such option; did you mean '{name}'"):
            make_method(KvConfig(method=method, method_options={f"{name}x": 1}))


@pytest.mark.parametrize("method", ["ams", "cask", "chunkkv"])
@pytest.mark.parametrize("options, words", [
    ({"lookahead": 2.5}, "lookahead=2.5: must be an integer >= 0, not a float"),
    ({"lookahaed": 3}, "lookahaed=3: no such option; did you mean 'lookahead'"),
    ({"chunk_fill": math.nan}, "chunk_fill=nan: must be a number in [0, 1)"),
])  # fmt: skip
def test_options_of_a_base_are_checked_as_strictly(method, options, words):
    with pytest.raises(UsageError) as error:
        make_method(KvConfig(method=method, method_options={"base": "kara", "base_options": options}))
    assert str(error.value).startswith(f"method_options of {method}: base_options of kara: {words}")


def test_a_whole_number_may_stand_for_a_float():
    kara = Kara(keydiff_power=0, chunk_fill=0)
    assert isinstance(kara.keydiff_power, float) and kara == Kara(keydiff_power=0.0, chunk_fill=0.0)
    assert hash(kara) == hash(Kara(keydiff_power=0.0, chunk_fill=0.0)) != hash(Kara())


def test_built_in_python_a_method_is_checked_too():
    with pytest.raises(UsageError, match="^lookahead='x': must be an integer >= 0, not a string"):
        Kara(lookahead="x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="^lookahaed=3: no such option; did you mean 'lookahead'"):
        Kara(lookahaed=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="^bidirectional=1: must be true or false, not an integer"):
        Kara(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [KvConfig, *methods().values()])
def test_every_option_has_help(cls):
    missing = [o.name for o in options_of(cls).values() if not o.help.endswith(".")]
    assert not missing
    assert set(options_of(cls)) == {f.name for f in fields(cls)}


def test_options_that_a_method_shares_with_the_configuration_have_one_default():
    for cls in methods().values():
        for name in SHARED_OPTIONS:
            if name in options_of(cls):
                assert options_of(cls)[name].default == options_of(KvConfig)[name].default
