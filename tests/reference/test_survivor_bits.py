"""Survivors in few bits, in the reference: selection is as before, and what is stored is the round trip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvllm.compression.compressor import Compressor
from kvllm.compression.rounding import Rounding, packed_block_tokens
from kvllm.config import KvConfig
from kvllm.reference import Request, compare, replay
from kvllm.reference.cache import DenseStore
from tests.reference.models import text, tiny_model

BLOCK_SIZE, PROMPT = 8, 13
CONFIG = KvConfig(window_size=64, buffer_size=16, query_stride=4, retention_ratio=0.75)  # 48 tokens of a window
AT_EVENT = 16 + 64 + 16  # the first compression happens in the step that starts here


def after_event(config: KvConfig, num_events: int = 1, dtype: torch.dtype = torch.float32) -> Request:
    """A request that has just been compressed for the `num_events`-th time, and computed one token more."""
    model = tiny_model("llama")
    if dtype != torch.float32:
        model = type(model)(model.config).eval().to(dtype)
    request, token_ids = Request(model, PROMPT, config, BLOCK_SIZE), text(400)
    while len(request.kept) < num_events:
        first = request.num_computed_tokens
        due = len(request.kept) == num_events - 1 and request.max_step() == config.window_size and first >= AT_EVENT
        request.step(token_ids[first : first + (1 if due else request.max_step() or 0)])
    return request


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["kara", "snapkv", "cask"])
def test_survivors_are_the_round_trip_of_what_16_bits_store(method, bits):
    config = replace(CONFIG, method=method)
    block_size_16 = 16  # at blocks of 8, heads of 16 in 8 bits would not be packed
    model, token_ids = tiny_model("llama"), text(400)
    plain, rounded = (Request(model, 16, replace(config, survivor_bits=b), block_size_16) for b in (16, bits))
    for request in (plain, rounded):
        request.step(token_ids[:AT_EVENT])
        request.step(token_ids[AT_EVENT : AT_EVENT + 1])
    assert torch.equal(plain.kept[0], rounded.kept[0]) and plain.kept[0].shape == (2, 2, 48)
    num_tokens = packed_block_tokens(block_size_16, 16, bits)
    assert num_tokens == {8: 24, 4: 48}[bits]
    for before, after in zip(plain.layers, rounded.layers, strict=True):
        keys, values = Rounding(bits, num_tokens).round_trip(before.keys[None, 16:64], before.values[None, 16:64])
        assert torch.equal(after.keys[16:64], keys[0]) and torch.equal(after.values[16:64], values[0])
        assert not torch.equal(after.keys[16:64], before.keys[16:64])
        for mine, theirs in ((after.keys, before.keys), (after.values, before.values)):
            assert torch.equal(mine[:16], theirs[:16])  # the prompt
            assert torch.equal(mine[64:-1], theirs[64:-1])  # the buffer; the newest token has seen the survivors
            assert mine.shape == theirs.shape


def test_each_packed_block_of_survivors_has_its_own_scales():
    """Blocks of 8 tokens hold 16 in 4 bits, so 48 survivors are three runs."""
    plain, rounded = (after_event(replace(CONFIG, survivor_bits=b)) for b in (16, 4))
    before, after = plain.layers[0].keys[16:64], rounded.layers[0].keys[16:64]
    for start in (0, 16, 32):
        alone, _ = Rounding(4, 16).round_trip(*[before[None, start : start + 16]] * 2)
        assert torch.equal(after[start : start + 16], alone[0])


def test_a_window_that_is_kept_whole_is_rounded_too():
    """Of windows of four blocks 3.6 are kept: the first time 4, then 3."""
    config = replace(CONFIG, window_size=32, retention_ratio=0.9)
    plain, rounded = (after_event(replace(config, survivor_bits=b)) for b in (16, 4))
    assert plain.kept[0].shape[-1] == 32
    for before, after in zip(plain.layers, rounded.layers, strict=True):
        keys, values = Rounding(4, 16).round_trip(before.keys[None, 16:48], before.values[None, 16:48])
        assert torch.equal(after.keys[16:48], keys[0]) and torch.equal(after.values[16:48], values[0])


def test_later_events_leave_old_survivors_alone():
    config = replace(CONFIG, survivor_bits=4)
    first, second = after_event(config, 1), after_event(config, 2)
    for before, after in zip(first.layers, second.layers, strict=True):
        assert torch.equal(before.keys[16:64], after.keys[16:64])
        assert torch.equal(before.values[16:64], after.values[16:64])


def test_the_cache_keeps_its_type():
    request = after_event(replace(CONFIG, survivor_bits=4), dtype=torch.bfloat16)
    assert {layer.keys.dtype for layer in request.layers} == {layer.values.dtype for layer in request.layers}
    assert request.layers[0].keys.dtype == torch.bfloat16


def test_fewer_bits_lose_more():
    model, token_ids = tiny_model("qwen3"), text(400)
    full = replay(model, token_ids, PROMPT, None, 16, keep_full=True)
    config = replace(CONFIG, method="snapkv", retention_ratio=0.75)
    exact = replay(model, token_ids, PROMPT, config, 16, keep_full=True)
    loss = {
        bits: compare(exact, replay(model, token_ids, PROMPT, replace(config, survivor_bits=bits), 16, True), AT_EVENT)
        for bits in (16, 8, 4)
    }
    assert loss[16].kl == 0
    assert 0 < loss[8].kl < loss[4].kl / 10 < compare(full, exact, AT_EVENT).kl


@pytest.mark.parametrize("config, rounding", [(CONFIG, Rounding(4, 16)), (replace(CONFIG, survivor_bits=4), None)])
def test_a_compressor_without_the_rounding_of_its_config_is_refused(config, rounding):
    request = after_event(CONFIG)
    (made,) = request._compressors
    with pytest.raises(ValueError, match="survivor_bits"):
        Compressor(
            config, made.method, DenseStore(config, request.layers), made.layers, made.shifts, made.rope,
            rounding=rounding,
        )  # fmt: skip


def test_fused_kernels_that_would_not_round_are_refused():
    request = after_event(CONFIG)
    (made,) = request._compressors
    with pytest.raises(ValueError, match="survivor_bits=4: the fused kernels do not round"):
        Compressor(
            replace(CONFIG, survivor_bits=4), made.method, made.store, made.layers, made.shifts, made.rope,
            fused=lambda *_: None, rounding=Rounding(4, 16),
        )  # fmt: skip
