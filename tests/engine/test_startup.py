"""The summary that an engine logs when it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from kvllm.compression.query_bank import QueryBank
from kvllm.config import KvConfig
from kvllm.engine import startup
from kvllm.engine.settings import kv_config
from kvllm.layers import Local
from kvllm.layout import Geometry

SIZES: dict[str, Any] = {"window_size": 64, "buffer_size": 32, "retention_ratio": 0.5}


@pytest.fixture(scope="module")
def vllm_config(model_dir: Path) -> Any:
    return EngineArgs(
        str(model_dir), dtype="float32", max_model_len=1024, enforce_eager=True, block_size=32, max_num_seqs=16,
        additional_config={"kvllm": SIZES},
    ).create_engine_config()  # fmt: skip


def test_the_log_says_how_many_requests_fit_and_the_size_of_the_bank(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kv_config(vllm_config)
    assert config is not None
    bank = QueryBank.allocate(30, 16, 24, 9, 3, 64, 4, vllm_config.model_config.dtype, device="meta").num_bytes
    assert startup.bank_bytes(vllm_config, config) == bank
    geometry = Geometry.from_config(config, 32)
    assert geometry is not None
    ours, stock = 200 // geometry.peak_blocks(256, 1024), 200 // 32
    text = startup.summary(vllm_config, config, geometry, 200, 2 * 32 * 3 * 64 * 4, 32)
    assert f"fit at once: {ours}; without compression, and" in text and f"KV cache: {stock}." in text
    assert f"Query bank: {bank / 2**30:.2f} GiB" in text and "max_num_seqs=16" in text
    monkeypatch.setattr(startup, "on_gpu", lambda vllm_config: True)  # where stock would have the bank's memory too
    page = bank // (30 * 100)
    assert f"KV cache: {300 // 32}." in startup.summary(vllm_config, config, geometry, 200, page, 32)
    assert "max_num_seqs lets 16 run" in startup.summary(vllm_config, config, geometry, 20_000, page, 32)


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "kara keeps 30% of every 256 generated tokens; the newest 128 are never compressed. Prompts: they stay"),
        ({"history_size": 512}, "at most 512 tokens of compressed windows"),
        ({"prompt_budget": 512}, "longer ones are cut to 512 tokens"),
        ({"policy": "budget"}, "policy budget, method kara: every 128 tokens the generated text is cut to 2048"),
        ({"survivor_bits": 4}, "rounded to 4 bits"),
        ({"retention_ratio": 1.0, "request_ratios": "0.5"}, "compression is off"),
    ],
)  # fmt: skip
def test_the_log_says_what_is_on(options: dict[str, Any], said: str) -> None:
    assert said in startup.what_is_on(KvConfig(**options))


def test_the_log_says_what_requests_may_choose() -> None:
    assert "not choose a kv_retention_ratio other" in startup.what_requests_may_ask(KvConfig())
    text = startup.what_requests_may_ask(KvConfig(request_ratios="0.2-0.5,1.0"))
    assert text.endswith("0.2-0.5, 1.0 in vllm_xargs; the default is 0.3.")
    text = startup.what_requests_may_ask(KvConfig(request_methods="random,keydiff"))
    assert text.endswith("allow it). They may choose kv_method random, keydiff; the default is kara.")


def test_layers_with_a_window_count_too(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 layers every sixth is full attention: one group of 5 full ones, and 5 of local ones."""
    config, layers = kv_config(vllm_config), [None if i % 6 == 5 else Local(128) for i in range(30)]
    monkeypatch.setattr(startup, "local_layers_of", lambda vllm_config: layers)
    assert config is not None
    geometry = Geometry.from_config(config, 32)
    assert geometry is not None
    local = 5 * (-(-(127 + 2) // 32) + 1)  # once the prompt is computed, two steps in flight
    in_prefill = 5 * (256 // 32)  # a prompt of 256 tokens in one step
    assert in_prefill >= local
    text = startup.summary(vllm_config, config, geometry, 2000, 2 * 32 * 3 * 64 * 4, 32)
    assert f"fit at once: {2000 // (geometry.peak_blocks(256, 1024) + in_prefill)}; " in text
    assert f"KV cache: {2000 // (32 + in_prefill)}; max_num_seqs lets 16 run" in text
    bank = QueryBank.allocate(5, 16, 24, 9, 3, 64, 4, vllm_config.model_config.dtype, device="meta").num_bytes
    assert startup.bank_bytes(vllm_config, config) == bank
