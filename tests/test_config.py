"""Every invalid option is refused when the config is built, with a message that names option, value and remedy."""

import dataclasses
import json
from typing import Any

import pytest

from kvllm.config import PRESETS, KvConfig, check_retention_ratio
from kvllm.errors import UsageError
from kvllm.layout import Geometry
from kvllm.methods import checked_config, make_method, make_methods
from kvllm.methods.h2o import H2O
from kvllm.methods.recent import Recent
from kvllm.options import options_of

FULL: dict[str, Any] = {
    "method": "h2o",
    "method_options": {"average": True},
    "policy": "budget",
    "retention_ratio": 0.25,
    "survivor_bits": 16,
    "request_ratios": "0.2-0.5,1.0",
    "request_methods": "random,keydiff",
    "window_size": 512,
    "buffer_size": 32,
    "max_chunk_size": 4,
    "query_stride": 4,
    "history_size": 0,
    "budget_size": 1024,
    "budget_interval": 64,
    "prompt_budget": 96,
    "seed": 7,
}


def refusal(options: dict) -> str:
    with pytest.raises(ValueError) as error:
        checked_config({"method": "recent", **options})
    return str(error.value)


@pytest.mark.parametrize("ratio", [0, 0.0, -0.3, 1.01, float("nan"), float("inf"), True, False, "0.3", None])
def test_retention_ratio_outside_0_1_is_refused(ratio):
    message = refusal({"retention_ratio": ratio})
    assert f"retention_ratio={ratio!r}" in message
    assert "must be a number in (0, 1]" in message and "to turn compression off use 1.0" in message


@pytest.mark.parametrize("ratio", [0, 1.01, True, "0.3", None])
def test_a_requests_own_ratio_is_refused_under_its_own_name(ratio):
    with pytest.raises(ValueError, match="kv_retention_ratio="):
        check_retention_ratio(ratio, name="kv_retention_ratio")


def test_check_retention_ratio_returns_a_float():
    assert check_retention_ratio(1) == 1.0 and isinstance(check_retention_ratio(1), float)


@pytest.mark.parametrize(
    "text, ranges",
    [
        ("", ()),
        ("0.5", ((0.5, 0.5),)),
        (" 0.2 - .5, 1 ", ((0.2, 0.5), (1.0, 1.0))),
        ("1.0,0.25", ((1.0, 1.0), (0.25, 0.25))),
    ],
)
def test_request_ratios_are_ratios_and_ranges(text, ranges):
    config = KvConfig(method="recent", retention_ratio=0.3, request_ratios=text)
    assert config.request_ratio_ranges == ((0.3, 0.3), *ranges)
    assert config.allows_ratio(0.3) and not config.allows_ratio(0.7)
    assert all(config.allows_ratio(low) and config.allows_ratio((low + high) / 2) for low, high in ranges)


@pytest.mark.parametrize(
    "value, message",
    [
        ("half", "'half' is neither a ratio nor a range"),
        ("0.2,", "'' is neither"),
        ("0.2-0.3-0.4", "'0.2-0.3-0.4' is neither"),
        ("0.5-0.2", "the range 0.5-0.2 ends below its start"),
        ("0.2-1.5", "in (0, 1]"),
        ("0", "in (0, 1]"),
        ([0.2, 0.5], "must be a string, not a list"),
    ],
)
def test_invalid_request_ratios_are_refused(value, message):
    said = refusal({"request_ratios": value})
    assert said.startswith(f"request_ratios={value!r}: ") and message in said


@pytest.mark.parametrize(
    "given, options",
    [
        ("", {}),
        (" random, keydiff ", {"random": {}, "keydiff": {}}),
        ({"snapkv": {"kernel_size": 7}, "random": {}}, {"snapkv": {"kernel_size": 7}, "random": {}}),
    ],
)
def test_request_methods_are_names_or_names_with_options(given, options):
    config = checked_config({"method": "recent", "request_methods": given, "seed": 3})
    assert config.request_method_options == options and config.methods == ("recent", *options)
    assert KvConfig.from_json(json.dumps(config.to_dict())) == config
    made = make_methods(config)
    assert list(made) == ["recent", *options]
    for name in options:  # each is what an engine with that method alone would have
        alone = KvConfig(method=name, method_options=options[name], seed=3)
        assert made[name] == make_method(alone) and config.of_method(name) == alone
    assert config.of_method("recent") == KvConfig(method="recent", seed=3)


@pytest.mark.parametrize(
    "value, message",
    [
        ("random,", "request_methods='random,': a name is missing beside a comma; use "),
        ("random,recent", "request_methods='random,recent': recent is the engine's own method, which requests may alw"),
        ({"recent": {}}, "request_methods={'recent': {}}: recent is the engine's own method"),
        ("randon", "request_methods='randon': no such method; did you mean 'random'?"),
        ({"random": 5}, "request_methods={'random': 5}: random=5: must be a mapping of the method's options; use {}"),
        ({"snapkv": {"kernel_size": 4}}, "request_methods of snapkv: kernel_size=4: must be odd"),
        ({"random": {"x": 1}}, "request_methods of random: x=1: no such option"),
        (["random"], "request_methods=['random']: must be a string or a mapping of names to values, not a list"),
    ],
)
def test_invalid_request_methods_are_refused(value, message):
    assert refusal({"request_methods": value}).startswith(message)


SIZES = ("window_size", "buffer_size", "max_chunk_size", "query_stride", "budget_size", "budget_interval")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -16])
def test_sizes_must_be_positive(name, value):
    assert refusal({name: value}).startswith(f"{name}={value}: must be an integer >= 1. ")


def test_history_size_is_a_number_of_tokens_or_0():
    message = refusal({"history_size": -1})
    assert message.startswith("history_size=-1: must be an integer >= 0. ") and "0 = no limit" in message
    assert KvConfig(method="recent", history_size=0).history_size == 0


def test_prompt_budget_is_whole_blocks_or_0():
    assert refusal({"prompt_budget": -16}).startswith(
        "prompt_budget=-16: must be an integer >= 0. A longer prompt is cut to "
    )
    for policy in ("window", "budget"):
        config = KvConfig(method="recent", policy=policy, prompt_budget=100)
        with pytest.raises(
            ValueError, match=r"prompt_budget=100: must be a multiple of the KV block size, 16 .*use 112"
        ):
            Geometry.from_config(config, block_size=16)
        geometry = Geometry.from_config(dataclasses.replace(config, prompt_budget=112), block_size=16)
        assert geometry is not None and geometry.prompt_budget == 112


def test_history_size_is_refused_under_the_budget_policy():
    message = refusal({"history_size": 2048, "policy": "budget"})
    assert "history_size=2048: only for policy=window" in message and "bounded by budget_size" in message


@pytest.mark.parametrize("value", [2, 5, 0, -4, 4.0, True, "4", None])
def test_survivor_bits_are_16_or_8_or_4(value):
    assert refusal({"survivor_bits": value}).startswith(f"survivor_bits={value!r}: must be one of 16, 8, 4")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"policy": "budget"},
            "cannot be combined with policy=budget, because .* again at each .*Use policy=window, or",
        ),
        ({"history_size": 512}, "cannot be combined with history_size=512, because .* again .*Use history_size=0, or"),
        ({"prompt_budget": 96}, "cannot be combined with prompt_budget=96, .*Use prompt_budget=0, or survivor_bits=16"),
        (
            {"retention_ratio": 1.0},
            "has no effect, because nothing is compressed with retention_ratio=1.0.* Use a lower retention_ratio, or",
        ),
        (
            {"retention_ratio": 1.0, "request_ratios": "1.0"},
            "has no effect, because nothing is compressed with retention_ratio=1.0",
        ),
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_survivors_are_rounded_once_or_not_at_all(bits, options, message):
    with pytest.raises(ValueError, match=f"^survivor_bits={bits}: {message}"):
        KvConfig(survivor_bits=bits, **options)
    assert KvConfig(survivor_bits=16, **options).survivor_bits == 16


def test_survivor_bits_with_ratios_that_requests_choose():
    assert KvConfig(survivor_bits=4, retention_ratio=1.0, request_ratios="0.5").survivor_bits == 4
    assert KvConfig(survivor_bits=4, retention_ratio=0.5, request_ratios="1.0").survivor_bits == 4


def test_a_history_that_holds_no_window_is_refused_with_a_remedy_that_works():
    config = KvConfig(method="recent", history_size=79)
    with pytest.raises(ValueError, match=r"history_size=79: one window alone leaves 80 .*at least 80"):
        Geometry.from_config(config, block_size=16)
    assert Geometry.from_config(dataclasses.replace(config, history_size=80), block_size=16) is not None
    with pytest.raises(ValueError, match=r"history_size=100: one window alone leaves 128 survivors"):
        Geometry.from_config(dataclasses.replace(config, history_size=100), block_size=16, retention_ratio=0.5)


@pytest.mark.parametrize("name", (*SIZES, "history_size", "prompt_budget", "seed"))
@pytest.mark.parametrize("value", [64.0, "64", True, None])
def test_sizes_must_be_integers(name, value):
    assert refusal({name: value}).startswith(f"{name}={value!r}: must be an integer")


@pytest.mark.parametrize("name, value", [("method", 3), ("policy", None), ("method_options", ["a"])])
def test_other_types_are_checked_too(name, value):
    assert refusal({name: value}).startswith(f"{name}={value!r}: must be ")


WRONG: dict[type, list[Any]] = {
    str: [3, True],
    int: ["4", True, 2.5],
    float: ["0.5", True, float("nan")],
    dict: [3, "{}"],
}


@pytest.mark.parametrize(
    "name, value", [(f.name, v) for f in dataclasses.fields(KvConfig) for v in WRONG[type(FULL[f.name])]]
)
def test_every_option_refuses_other_types_in_one_line_with_a_remedy(name, value):
    message = refusal({name: value})
    assert message.startswith(f"{name}={value!r}: must be ") and "\n" not in message
    assert options_of(KvConfig)[name].help.split(". ")[0] in message


def test_a_requests_ratio_of_the_wrong_type_is_refused_with_the_type():
    with pytest.raises(UsageError, match=r"^kv_retention_ratio='0.5': must be a number in \(0, 1\], not a string\. "):
        check_retention_ratio("0.5", name="kv_retention_ratio")


def test_a_key_that_is_not_a_string_is_refused():
    assert refusal({1: 2}).startswith("1=2: no such option; options are method, ")


def test_the_options_are_copied():
    options = {"average": True}
    config = KvConfig(method="h2o", method_options=options)
    options["average"] = False
    assert config.method_options == {"average": True}


def test_unknown_policy_is_refused_with_the_known_ones():
    message = refusal({"policy": "windows"})
    assert "policy='windows'" in message and "window, budget" in message


def test_unknown_method_is_refused_with_a_suggestion():
    assert refusal({"method": "recnt"}) == "method='recnt': no such method; did you mean 'recent'?"


def test_a_method_name_unlike_any_other_is_refused_with_the_list():
    message = refusal({"method": "zzzzzz"})
    assert "method='zzzzzz': no such method; methods are " in message and "recent" in message


def test_unknown_key_is_refused_with_a_suggestion():
    assert refusal({"retention": 0.3}) == "retention=0.3: no such option; did you mean 'retention_ratio'?"


def test_a_key_unlike_any_other_is_refused_with_the_list():
    message = refusal({"zzzzzz": 0.3})
    assert message.startswith("zzzzzz=0.3: no such option; options are ")
    assert all(f.name in message for f in dataclasses.fields(KvConfig))


def test_unknown_method_option_is_refused_with_the_methods_own():
    message = refusal({"method": "keydiff", "method_options": {"colour": "red"}})
    assert message == "method_options of keydiff: colour='red': no such option; options are none."
    message = refusal({"method": "h2o", "method_options": {"averag": True}})
    assert message == "method_options of h2o: averag=True: no such option; did you mean 'average'?"


@pytest.mark.parametrize("name, value", [("window_size", 252), ("buffer_size", 60)])
def test_query_stride_must_divide_the_sizes(name, value):
    message = refusal({name: value, "query_stride": 8})
    assert "query_stride=8" in message and f"must divide {name}={value}" in message


@pytest.mark.parametrize("name, value", [("budget_size", 2044), ("budget_interval", 124)])
def test_query_stride_must_divide_the_budget_under_its_policy_only(name, value):
    assert f"must divide {name}={value}" in refusal({"policy": "budget", name: value, "query_stride": 8})
    KvConfig(method="recent", policy="window", query_stride=8, **{name: value})


@pytest.mark.parametrize(
    "policy, name, value",
    [("window", "window_size", 248), ("budget", "budget_size", 2040), ("budget", "budget_interval", 136)],
)
def test_window_and_budget_must_be_whole_blocks(policy, name, value):
    config = KvConfig(method="recent", policy=policy, **{name: value})
    with pytest.raises(ValueError) as error:
        Geometry.from_config(config, block_size=16)
    nearest = -(-value // 16) * 16
    assert str(error.value).startswith(f"{name}={value}: must be a multiple of the KV block size, 16 tokens")
    assert f"use {nearest}," in str(error.value) and "--block-size" in str(error.value)


def test_a_window_of_one_block_is_refused_with_a_remedy_that_works():
    config = KvConfig(method="recent", window_size=16, buffer_size=16)
    with pytest.raises(ValueError, match=r"window_size=16: .*at least 64"):
        Geometry.from_config(config, block_size=16)
    assert Geometry.from_config(dataclasses.replace(config, window_size=64), block_size=16) is not None


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_a_requests_own_ratio_is_checked_by_the_geometry(ratio):
    with pytest.raises(ValueError, match=f"retention_ratio={ratio}"):
        Geometry.from_config(KvConfig(method="recent"), block_size=16, retention_ratio=ratio)


@pytest.mark.parametrize("policy", ["window", "budget"])
def test_ratio_1_turns_compression_off(policy):
    config = KvConfig(method="recent", policy=policy, retention_ratio=1.0)
    assert not config.enabled and Geometry.from_config(config, block_size=16) is None
    on = KvConfig(method="recent", policy=policy)
    assert on.enabled and Geometry.from_config(on, block_size=16, retention_ratio=1.0) is None
    assert Geometry.from_config(config, block_size=16, retention_ratio=0.5) is not None


def test_ratio_1_does_not_ask_for_whole_blocks():
    assert Geometry.from_config(KvConfig(method="recent", window_size=248, retention_ratio=1), block_size=16) is None


def test_dict_and_json_round_trip():
    assert set(FULL) == {f.name for f in dataclasses.fields(KvConfig)}
    config = KvConfig(**FULL)
    assert config.to_dict() == FULL
    assert KvConfig.from_dict(config.to_dict()) == config
    assert KvConfig.from_json(json.dumps(config.to_dict())) == config
    assert KvConfig.from_json("{}") == KvConfig()


def test_to_dict_does_not_share_the_options():
    config = KvConfig(**FULL)
    config.to_dict()["method_options"]["average"] = False
    assert config.method_options == {"average": True}


@pytest.mark.parametrize("text", ["{", "", "{'retention_ratio': 0.3}"])
def test_text_that_is_not_json_is_refused(text):
    with pytest.raises(ValueError, match="not valid JSON"):
        KvConfig.from_json(text)


@pytest.mark.parametrize("text", ["[]", "0.3", '"recent"', "null"])
def test_json_that_is_not_an_object_is_refused(text):
    with pytest.raises(ValueError, match="expected a mapping of options"):
        KvConfig.from_json(text)


def test_defaults_build_and_are_the_documented_ones():
    config = KvConfig()
    assert (config.method, config.policy, config.retention_ratio) == ("kara", "window", 0.3)
    assert (config.window_size, config.buffer_size, config.max_chunk_size) == (256, 128, 8)
    geometry = Geometry.from_config(config, block_size=16)
    assert geometry is not None and geometry.shape(0).num_kept == 80


def test_the_method_gets_its_options():
    assert make_method(KvConfig(method="recent")) == Recent()
    assert make_method(KvConfig(**FULL)) == H2O(average=True)


@pytest.mark.parametrize("name, blocks", [("4x", 4), ("8x", 2), ("16x", 1)])
def test_presets_store_a_window_so_many_times_smaller(name, blocks):
    """16 plain blocks become 4, 2 or 1 packed ones, on GPUs, whose blocks of 16 tokens hold 56 packed survivors."""
    config = KvConfig.from_dict({"compression": name, "method": "recent"})
    geometry = Geometry.from_config(config, block_size=16, packed_tokens=56)
    assert geometry is not None
    assert all(geometry.num_kept_blocks(event) == blocks for event in range(20)) and 16 // blocks == int(name[:-1])
    assert KvConfig.from_dict({"compression": name, **PRESETS[name]}) == KvConfig(**PRESETS[name])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compression": "5x"}, "compression='5x': use one of 4x, 8x, 16x"),
        ({"compression": 4}, "compression=4: use one of"),
        ({"compression": ["8x"]}, "use one of 4x, 8x, 16x"),
        ({"compression": "8x", "retention_ratio": 0.3}, "compression=8x: sets retention_ratio=0.4375, but"),
        ({"compression": "8x", "policy": "budget"}, "survivor_bits=4: cannot be combined with policy=budget"),
    ],
)
def test_invalid_or_contradicted_presets_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        KvConfig.from_dict(options)
