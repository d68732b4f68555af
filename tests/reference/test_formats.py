"""Caches that store every token in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kvllm.config import KvConfig
from kvllm.reference import Request, feed
from kvllm.reference.formats import FP8_MAX, CacheFormat, Fp8
from tests.reference.models import text, tiny_model

BLOCK_SIZE, PROMPT = 8, 13
CONFIG = KvConfig(window_size=32, buffer_size=16, query_stride=4, retention_ratio=0.5)


class Halved:
    """A format that shows where it was applied."""

    exact_prefill: ClassVar[bool] = True

    def round_trip(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys / 2, values / 2

    def token_bytes(self, head_dim: int) -> float:
        return head_dim


def request(format: CacheFormat, config: KvConfig | None = None) -> Request:
    return Request(tiny_model("llama"), PROMPT, config, BLOCK_SIZE, formats=[format] * 2)


def test_fp8_rounds_to_three_bits_of_mantissa_and_saturates():
    x = torch.tensor([[[1.0, 1.05, 1.07, 1000.0, -1000.0, 0.0]]])
    keys, values = Fp8().round_trip(x, x.bfloat16())
    assert keys[0, 0].tolist() == [1.0, 1.0, 1.125, FP8_MAX, -FP8_MAX, 0.0] and FP8_MAX == 448
    assert keys.dtype == torch.float32 and values.dtype == torch.bfloat16
    assert torch.equal(Fp8().round_trip(keys, keys)[0], keys)


@pytest.mark.parametrize("format", [Fp8(), Halved()])
@pytest.mark.parametrize("config", [None, CONFIG])
def test_a_replay_sees_what_generation_token_by_token_would(format, config):
    token_ids = text(120)
    at_once = feed(request(format, config), token_ids)
    slow = request(format, config)
    rows = [slow.step(token_ids[:PROMPT])]
    rows += [slow.step([token]) for token in token_ids[PROMPT:-1]]
    logprobs = torch.cat(rows).log_softmax(-1)[torch.arange(119), torch.tensor(token_ids[1:])]
    torch.testing.assert_close(at_once.logprobs, logprobs, rtol=0, atol=2e-4)  # float32 matmuls of other shapes
    exact = feed(Request(tiny_model("llama"), PROMPT, config, BLOCK_SIZE), token_ids).logprobs
    assert (at_once.logprobs[PROMPT:] - exact[PROMPT:]).abs().max() > 1e-3


def test_a_prompt_attends_to_itself_before_it_is_stored():
    token_ids = text(60)
    plain = Request(tiny_model("llama"), PROMPT, None, BLOCK_SIZE)
    expected, found = plain.step(token_ids[:PROMPT]), (halved := request(Halved())).step(token_ids[:PROMPT])
    assert torch.equal(found, expected)
    assert torch.equal(halved.layers[0].keys, plain.layers[0].keys / 2)
    with pytest.raises(ValueError, match="the next event allows 1 to 13"):
        request(Halved()).step(token_ids[:20])


@pytest.mark.parametrize("bits", [16, 4])
def test_survivors_are_stored_in_the_caches_format_unless_they_are_packed(bits):
    config = replace(CONFIG, survivor_bits=bits, window_size=64)
    compressed, token_ids = request(Fp8(), config), text(120)
    while not compressed.kept:
        first = compressed.num_computed_tokens
        compressed.step(token_ids[first : first + (compressed.max_step() or 1)])
    survivors = compressed.layers[1].values[16 : 16 + compressed.kept[0].shape[-1]]
    in_fp8 = torch.equal(Fp8().round_trip(survivors, survivors)[1], survivors)
    assert in_fp8 == (bits == 16)
