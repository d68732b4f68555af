"""Requests on arrival, through vLLM's input processor: which are refused or capped, and with which message."""

from __future__ import annotations

import inspect
import logging
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.logger import _print_warning_once
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine import EngineCoreReadyResponse
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.input_processor import InputProcessor

from kvllm.checks import allowed_geometries
from kvllm.engine.requests import usable_blocks
from kvllm.engine.settings import Geometries, kv_config
from kvllm.layout import Geometry

BLOCK_SIZE = 32
NUM_BLOCKS = 22  # 704 tokens
SIZES: dict[str, Any] = {"window_size": 64, "buffer_size": 32, "retention_ratio": 0.5}

Arrive = Callable[..., Any]


def vllm_config(model_dir: Path, max_model_len: int = 1024, **kvllm: Any) -> Any:
    return EngineArgs(
        str(model_dir), dtype="float32", max_model_len=max_model_len, enforce_eager=True, block_size=BLOCK_SIZE,
        additional_config={"kvllm": SIZES | kvllm},
    ).create_engine_config()  # fmt: skip


def arrival(config: Any, num_blocks: int = NUM_BLOCKS) -> Arrive:
    """A function that sends a request to a front end whose engine has `num_blocks` usable blocks."""
    config.cache_config.num_gpu_blocks = num_blocks + 1
    processor = InputProcessor(config)

    def arrive(
        num_prompt_tokens: int, *, ratio: Any = None, method: Any = None, resumable: bool = False, **sampling: Any
    ) -> Any:
        chosen = {"kv_retention_ratio": ratio, "kv_method": method}
        extra = {name: value for name, value in chosen.items() if value is not None} or None
        prompt = {"type": "token", "prompt_token_ids": [7] * num_prompt_tokens}
        params = SamplingParams(extra_args=extra, **sampling)
        return processor.process_inputs("id", prompt, params, ("generate",), resumable=resumable).sampling_params

    return arrive


def refusal(arrive: Arrive, *args: Any, **kwargs: Any) -> tuple[str | None, str]:
    """(parameter, message) of the refusal."""
    with pytest.raises(VLLMValidationError) as error:
        arrive(*args, **kwargs)
    return error.value.parameter, str(error.value)


# ------------------------------------------------------------------ which ratios


@pytest.mark.parametrize(
    "allowed, accepted, refused, said",
    [
        ("", (None, 0.5), (0.25, 0.51, 1.0), "only its own ratio, 0.5"),
        ("1.0", (None, 0.5, 1.0), (0.25, 0.99), "0.5, 1.0"),
        ("0.55-0.75, 1", (0.55, 0.6, 0.75, 0.5, 1), (0.54, 0.76, 0.25), "0.5, 0.55-0.75, 1.0"),
    ],
)
def test_a_request_chooses_among_the_ratios_that_the_operator_allows(
    model_dir: Path, allowed: str, accepted: tuple[Any, ...], refused: tuple[Any, ...], said: str
) -> None:
    arrive = arrival(vllm_config(model_dir, request_ratios=allowed))
    for ratio in accepted:
        arrive(10, max_tokens=5, ratio=ratio)
    for ratio in refused:
        parameter, message = refusal(arrive, 10, max_tokens=5, ratio=ratio)
        assert parameter == "kv_retention_ratio"
        assert f"kv_retention_ratio={ratio}: this server allows {said}. Leave kv_retention_ratio out" in message
        assert "--request-ratios" in message


@pytest.mark.parametrize("ratio, name", [("0.5", "a string"), (True, "a boolean"), ([0.5], "a list")])
def test_a_ratio_of_the_wrong_type_is_refused_by_its_type(model_dir: Path, ratio: Any, name: str) -> None:
    parameter, message = refusal(arrival(vllm_config(model_dir)), 10, max_tokens=5, ratio=ratio)
    assert parameter == "kv_retention_ratio"
    assert f"kv_retention_ratio={ratio!r}: must be a number in (0, 1], not {name}." in message


@pytest.mark.parametrize(
    "offered, accepted, said",
    [
        ("", (None, "kara"), "only its own method, kara"),
        ("random,keydiff", (None, "kara", "random", "keydiff"), "kara, random, keydiff"),
        ({"snapkv": {"kernel_size": 7}}, ("kara", "snapkv"), "kara, snapkv"),
    ],
)
def test_a_request_chooses_among_the_methods_that_the_engine_holds(
    model_dir: Path, offered: Any, accepted: tuple[Any, ...], said: str
) -> None:
    arrive = arrival(vllm_config(model_dir, request_methods=offered))
    for method in accepted:
        arrive(10, max_tokens=5, method=method)
    for method in ("h2o", "randon", "", "KARA"):
        parameter, message = refusal(arrive, 10, max_tokens=5, method=method)
        assert parameter == "kv_method"
        assert f"kv_method={method!r}: this server allows {said}. Leave kv_method out" in message
        assert "--request-methods" in message
    for value, name in ((5, "an integer"), (True, "a boolean"), (["random"], "a list")):
        parameter, message = refusal(arrive, 10, max_tokens=5, method=value)
        assert parameter == "kv_method" and f"kv_method={value!r}: must be a string, not {name}." in message


@pytest.mark.parametrize(
    "options, message",
    [
        ({"request_methods": "randon"}, "request_methods='randon': no such method; did you mean 'random'"),
        ({"request_methods": "kara"}, "request_methods='kara': kara is the engine's own method"),
        (
            {"request_methods": "pyramidkv"},
            "request_methods='pyramidkv': cannot be combined with pyramidkv, because it",
        ),
        (
            {"method": "pyramidkv", "request_methods": "snapkv"},
            "request_methods='snapkv': cannot be combined with pyramidkv, .* Leave pyramidkv out, or serve it as",
        ),
        ({"request_methods": "trimkv"}, "request_methods of trimkv: .*gates"),
    ],
)
def test_methods_that_an_engine_cannot_hold_are_refused_at_start(
    model_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        vllm_config(model_dir, **options)


@pytest.mark.parametrize(
    "allowed, message",
    [
        ("0.2-0.5", r"request_ratios='0.2-0.5': .*retention_ratio=0.2: every window keeps at least one block"),
        ("0.5,0.3", r"request_ratios='0.5,0.3': .*retention_ratio=0.3: .*window_size of at least 128"),
    ],
)
def test_allowed_ratios_that_fit_no_geometry_are_refused_at_start(model_dir: Path, allowed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vllm_config(model_dir, request_ratios=allowed)


def test_state_is_bounded_however_many_ratios_are_asked_for(model_dir: Path) -> None:
    config = kv_config(vllm_config(model_dir, request_ratios="0.505-0.74"))
    assert config is not None
    geometries, rng, made = Geometries(config, BLOCK_SIZE), random.Random(0), set()
    for _ in range(20_000):
        ratio = rng.uniform(0.505, 0.74)
        geometry = geometries.of(SamplingParams(extra_args={"kv_retention_ratio": ratio}))
        assert isinstance(geometry, Geometry) and abs(geometry.kept_blocks / 2 - ratio) <= 0.005
        made.add(geometry)
    assert len(made) == 25  # 0.505, and the hundredths from 0.51 to 0.74


@pytest.mark.parametrize("history_size", [0, 1024])
def test_the_allowed_geometries_are_all_that_a_request_can_have(model_dir: Path, history_size: int) -> None:
    sizes: dict[str, Any] = {"window_size": 512, "retention_ratio": 0.3, "history_size": history_size}
    config = kv_config(vllm_config(model_dir, request_ratios="0.07-0.12,0.4-0.43,0.9,1.0", **sizes))
    assert config is not None
    allowed, geometries, rng = allowed_geometries(config, BLOCK_SIZE), Geometries(config, BLOCK_SIZE), random.Random(0)
    ratios = [0.3, 0.9, *(rng.uniform(*ends) for ends in ((0.07, 0.12), (0.4, 0.43)) for _ in range(1000))]
    assert {geometries.of_ratio(ratio) for ratio in ratios} == set(allowed)
    expected = [0.3, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.4, 0.41, 0.42, 0.43, 0.9]
    assert [round(float(g.kept_blocks) / 16, 4) for g in allowed] == expected


# ------------------------------------------------------------------ what fits


def test_an_answer_without_max_tokens_is_capped_to_what_fits(model_dir: Path) -> None:
    """None is what `LLM.generate` passes on, the rest of `max_model_len` what vLLM's server fills in."""
    arrive = arrival(vllm_config(model_dir, request_ratios="1.0"))
    for left_out in (None, 1024 - 500):
        assert arrive(500, ratio=1.0, max_tokens=left_out).max_tokens == 704 - 500
    # At 832 tokens it holds the prompt's 512, 128 survivors of four windows, and 64 more: all 22 blocks.
    assert arrive(500, max_tokens=None).max_tokens == 832 - 500
    assert refusal(arrive, 500, ratio=1.0, max_tokens=1024 - 501)[0] == "max_tokens"
    # A compressed one whose prompt leaves no room to its first event.
    assert arrive(650, max_tokens=None).max_tokens == 704 - 650


def test_a_default_of_max_tokens_is_capped_too(model_dir: Path) -> None:
    """vLLM's server fills in `max_new_tokens` of the model's generation config; `SamplingParams` has 16."""
    config = vllm_config(model_dir, request_ratios="1.0")
    config.model_config.override_generation_config = {"max_new_tokens": 400}
    arrive = arrival(config)
    assert arrive(500, ratio=1.0, max_tokens=400).max_tokens == 204
    assert arrive(700, ratio=1.0).max_tokens == 4 and refusal(arrive, 700, ratio=1.0, max_tokens=17)[0] == "max_tokens"
    assert refusal(arrive, 500, ratio=1.0, max_tokens=401)[0] == "max_tokens"


def test_capping_leaves_the_callers_parameters_alone(model_dir: Path) -> None:
    config = vllm_config(model_dir, request_ratios="1.0")
    config.cache_config.num_gpu_blocks = NUM_BLOCKS + 1
    processor = InputProcessor(config)
    params = SamplingParams(max_tokens=624, extra_args={"kv_retention_ratio": 1.0}, skip_clone=True)
    made = [
        processor.process_inputs("id", {"type": "token", "prompt_token_ids": [7] * n}, params, ("generate",))
        for n in (400, 10)
    ]
    assert [m.sampling_params.max_tokens for m in made] == [304, 624] and params.max_tokens == 624


def test_a_cap_below_min_tokens_is_refused_under_that_name(model_dir: Path) -> None:
    arrive = arrival(vllm_config(model_dir, request_ratios="1.0"))
    parameter, message = refusal(arrive, 500, ratio=1.0, max_tokens=None, min_tokens=300)
    assert parameter == "min_tokens"
    assert "min_tokens=300: with a prompt of 500 tokens at most 204 more fit" in message
    assert "min_tokens of at most 204, or kv_retention_ratio=0.5" in message
    assert arrive(500, ratio=1.0, max_tokens=None, min_tokens=204).max_tokens == 204


@pytest.mark.parametrize("max_tokens", [None, 5, 1024 - 711])
@pytest.mark.parametrize("ratio", [None, 1.0])
def test_a_prompt_that_cannot_fit_is_refused_for_its_length(
    model_dir: Path, ratio: float | None, max_tokens: int | None
) -> None:
    arrive = arrival(vllm_config(model_dir, request_ratios="1.0"))
    parameter, message = refusal(arrive, 711, ratio=ratio, max_tokens=max_tokens)
    assert parameter == "input_tokens"
    assert "prompt of 711 tokens does not fit" in message and "holds 704 tokens" in message
    assert "prompt of at most 703 tokens" in message and "max_tokens" not in message
    assert refusal(arrive, 704, ratio=ratio, max_tokens=max_tokens)[0] == "input_tokens"
    assert arrive(703, ratio=ratio, max_tokens=1).max_tokens == 1


def test_the_refusal_of_a_request_says_what_would_fit(model_dir: Path) -> None:
    arrive = arrival(vllm_config(model_dir, request_ratios="1.0"))
    parameter, message = refusal(arrive, 20, ratio=1.0, max_tokens=780)
    assert parameter == "max_tokens"
    assert "needs 25 KV blocks at its peak, but the pool has 22" in message
    assert "Use a max_tokens of at most 684, or kv_retention_ratio=0.5." in message
    assert arrive(20, ratio=1.0, max_tokens=684).max_tokens == 684 and arrive(20, ratio=0.5, max_tokens=780)


def test_no_ratio_is_suggested_if_none_would_help(model_dir: Path) -> None:
    arrive = arrival(vllm_config(model_dir, max_model_len=4096))
    _, message = refusal(arrive, 20, max_tokens=3000)
    assert "kv_retention_ratio" not in message


@pytest.mark.parametrize("allowed", ["", "1.0"])
def test_a_streaming_input_session_is_refused_under_its_own_name(model_dir: Path, allowed: str) -> None:
    arrive = arrival(vllm_config(model_dir, request_ratios=allowed))
    parameter, message = refusal(arrive, 10, max_tokens=5, resumable=True)
    assert parameter == "resumable" and "send the request with kv_retention_ratio=1.0" in message
    assert ("operator must first allow" in message) == (not allowed)


def test_a_streaming_input_session_may_outgrow_its_first_prompt(model_dir: Path) -> None:
    """Its length is not known on arrival, so only a pool for all of `max_model_len` is safe."""
    uncompressed = {"ratio": 1.0, "max_tokens": 5, "resumable": True}
    arrive = arrival(vllm_config(model_dir, request_ratios="1.0"))
    parameter, message = refusal(arrive, 10, **uncompressed)
    assert parameter == "resumable" and "--max-model-len of at most 704" in message
    arrival(vllm_config(model_dir, max_model_len=704, request_ratios="1.0"))(10, **uncompressed)


# ------------------------------------------------------------------ how large a pool


def ready(num_blocks: int, rank: int) -> bytes:
    """The message that an engine sends to each front end once it has started."""
    return msgspec.msgpack.encode(
        EngineCoreReadyResponse(
            max_model_len=1024, num_gpu_blocks=num_blocks, block_size=BLOCK_SIZE, dp_stats_address=None,
            dtype="float32", vllm_version="0.32.0", world_size=1, data_parallel_size=2, tensor_parallel_size=1,
            pipeline_parallel_size=1, decode_context_parallel_size=1, data_parallel_rank=rank, max_num_seqs=8,
            max_num_batched_tokens=1024, instance_id="", supports_lora=False, max_loras=0,
        )
    )  # fmt: skip


def num_engines(parallel: Any) -> int:
    """How many engines `MPClient.__init__` waits for, by vLLM's own lines."""
    lines = inspect.getsource(MPClient.__init__)
    found = lines[lines.index("dp_size = ") : lines.index("assert parallel_config.data_parallel_size_local <=")]
    client = SimpleNamespace()
    exec(textwrap.dedent(" " * 12 + found), {"parallel_config": parallel, "self": client})
    return len(client.engine_ranks_managed)


@pytest.mark.parametrize(
    "parallel, pools",
    [
        ({"data_parallel_size": 1}, [23]),
        ({"data_parallel_size": 2}, [23, 23]),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, [23] * 4),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1, "data_parallel_hybrid_lb": True}, [23]),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True}, [23, 23]),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1, "data_parallel_external_lb": True}, [23]),
        ({"data_parallel_size": 2, "data_parallel_rank_local": 0}, [23]),
        ({"data_parallel_size": 2}, [23, 40]),
        ({"data_parallel_size": 2}, [40, 23]),
    ],
    ids="one internal remote hybrid hybrid-2 external offline uneven uneven-2".split(),
)
def test_the_pool_is_that_of_one_engine_in_every_mode_of_data_parallelism(
    model_dir: Path, parallel: dict[str, Any], pools: list[int]
) -> None:
    config = vllm_config(model_dir, request_ratios="1.0")
    # What vLLM leaves there unless each engine has a front end of its own, which tells it its rank.
    for name, value in ({"data_parallel_rank_local": None} | parallel).items():
        setattr(config.parallel_config, name, value)
    client: Any = object.__new__(MPClient)  # without its processes: what it does with each engine's answer
    client.vllm_config, client._effective_attention_block_sizes = config, set()
    client.stats_update_address, client._kv_event_sources = None, {}
    assert len(pools) == num_engines(config.parallel_config)
    for rank, num_blocks in enumerate(pools):
        client._apply_ready_response(ready(num_blocks, rank))
    assert config.cache_config.num_gpu_blocks == sum(pools)
    arrive = arrival_after_start(config)
    assert arrive(700 - 100, 104) == 104
    with pytest.raises(VLLMValidationError, match="the pool has 22"):
        arrive(700 - 100, 105)


def arrival_after_start(config: Any) -> Callable[[int, int], int]:
    processor = InputProcessor(config)

    def arrive(num_prompt_tokens: int, max_tokens: int) -> int:
        params = SamplingParams(max_tokens=max_tokens, extra_args={"kv_retention_ratio": 1.0})
        prompt = {"type": "token", "prompt_token_ids": [7] * num_prompt_tokens}
        return processor.process_inputs("id", prompt, params, ("generate",)).sampling_params.max_tokens

    return arrive


def test_an_unknown_pool_refuses_nothing(model_dir: Path) -> None:
    config = vllm_config(model_dir)
    assert config.cache_config.num_gpu_blocks is None and usable_blocks(config.cache_config) == 0
    assert arrival_after_start(vllm_config(model_dir, request_ratios="1.0"))(600, 400) == 400


# ------------------------------------------------------------------ beam search


def test_beam_search_says_once_that_it_is_not_compressed(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    stock = EngineArgs(str(model_dir), dtype="float32", max_model_len=1024, enforce_eager=True).create_engine_config()
    compressed, params = vllm_config(model_dir), BeamSearchParams(beam_width=2, max_tokens=5)
    logger = logging.getLogger("vllm.kvllm.engine.requests")
    # Other tests of this process may have made vLLM quiet, or have had the warning.
    level = logger.level
    logger.setLevel(logging.WARNING)
    _print_warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        InputProcessor(stock).resolve_watermarking(params)
        processor = InputProcessor(compressed)
        processor.resolve_watermarking(SamplingParams())
        assert not said
        for _ in range(2):
            processor.resolve_watermarking(params)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(said) == 1 and "beam search is not compressed" in said[0]
