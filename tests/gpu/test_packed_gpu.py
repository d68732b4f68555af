"""Survivors in four bits under full CUDA graphs: outputs are the reference's as far as bfloat16 allows. Needs a GPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from vllm import LLM

from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
from kvllm.errors import UsageError
from kvllm.reference import generate
from tests.gpu.test_engine_gpu import greedy, model_dir, prompt, reference_model, start  # noqa: F401
from tests.near_ties import greedy_losses
from tests.random_traffic import run_traffic

pytestmark = pytest.mark.engine

# Two packed blocks of 56 tokens of each window. The method scores by position alone, so that bfloat16 moves no choice.
CONFIG = KvConfig(
    method="streaming_llm",
    window_size=128,
    buffer_size=32,
    retention_ratio=0.875,
    survivor_bits=4,
    request_ratios="1.0",
)
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN"}
NUM_TOKENS = 700


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:  # noqa: F811
    made = start(model_dir, CONFIG, num_gpu_blocks_override=150, **OPTIONS)
    yield made
    made.llm_engine.engine_core.shutdown()


def losses(model: Any, prompts: list[list[int]], outputs: list[list[int]], config: KvConfig | None) -> Tensor:
    """How far each token is from the reference's best, in nats."""
    return torch.cat(
        [greedy_losses(model, p, o, config, 16, packed=bool(config)) for p, o in zip(prompts, outputs, strict=True)]
    ).cpu()


def summary(loss: Tensor) -> str:
    return f"mean {loss.mean():.5f}, most {loss.max():.3f}, not the best {float((loss > 0).float().mean()):.3f}"


def test_outputs_are_the_references(llm: LLM, reference_model: Any) -> None:  # noqa: F811
    prompts = [prompt(n, n) for n in (1, 16, 17, 70, 300)]
    outputs = greedy(llm, prompts, NUM_TOKENS)
    stats = engine_stats(llm)
    assert stats["num_windows_compressed"] >= 5 * len(prompts)
    assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
    loss = losses(reference_model, prompts, outputs, CONFIG)
    in_half = copy.deepcopy(reference_model).bfloat16()
    answers = [generate(in_half, p, NUM_TOKENS, CONFIG, ignore_eos=True, packed=True).token_ids for p in prompts]
    own = losses(reference_model, prompts, answers, CONFIG)
    other = losses(reference_model, prompts, outputs, replace(CONFIG, retention_ratio=0.4375))
    print("packed:", summary(loss), "| reference in bfloat16:", summary(own), "| other survivors:", summary(other))
    # A code that bfloat16 moves is a whole step: the reference in bfloat16 misses its own best token as often.
    assert loss.mean() < 1.5 * own.mean()
    # The figures can tell: they are larger against a reference that keeps other tokens.
    assert other.mean() > 5 * loss.mean()


def test_random_traffic_with_preemption(llm: LLM, reference_model: Any) -> None:  # noqa: F811
    """Requests of random lengths in a pool too small for them: resumed ones prefill over packed survivors."""
    rng, before = random.Random(0), engine_stats(llm)
    texts = {str(i): prompt(rng.randrange(1, 200), i) for i in range(60)}
    lengths = {i: rng.randrange(10, 700) for i in texts}
    outputs, aborted = run_traffic(
        llm.llm_engine, texts, lengths, rng, lambda *_: rng.randrange(0, 3), abort_chance=0.01, detokenize=False
    )
    after = engine_stats(llm)
    assert after["num_preemptions"] > before["num_preemptions"] and aborted
    assert after["free_kv_blocks"] == after["num_kv_blocks"]
    finished = sorted(set(outputs) - aborted)
    assert len(finished) + len(aborted) >= 60 and all(len(outputs[i]) == lengths[i] for i in finished)
    loss = losses(reference_model, [texts[i] for i in finished], [outputs[i] for i in finished], CONFIG)
    print("preemptions:", after["num_preemptions"] - before["num_preemptions"], summary(loss))
    alone = losses(
        reference_model, [texts[i] for i in finished[:8]],
        [greedy(llm, [texts[i]], lengths[i])[0] for i in finished[:8]], CONFIG,
    )  # fmt: skip
    assert loss.mean() < 2 * alone.mean() + 1e-3


def test_fused_kernels_and_fewer_blocks(model_dir: Path, reference_model: Any) -> None:  # noqa: F811
    """Kara's own kernels, refits included, pack what they leave; the pool holds what the geometry says."""
    config = replace(CONFIG, method="kara", retention_ratio=0.4375)
    llm = start(model_dir, config, **OPTIONS)
    prompts = [prompt(n, n) for n in (5, 70)]
    outputs = greedy(llm, prompts, 1200)
    stats = engine_stats(llm)
    # 8 windows, one packed block each, beside prompt, window and buffer.
    assert stats["peak_kv_blocks"] <= 1 + 5 + 2 * (8 + (128 + 32) // 16 + 1)
    loss = losses(reference_model, prompts, outputs, config)
    random_ = losses(reference_model, prompts, outputs, replace(config, method="random"))
    print("kara, packed:", summary(loss), "| against random survivors:", summary(random_))
    assert loss.mean() < random_.mean() / 3
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float32", "attention_backend": "TRITON_ATTN"}, "dtype=float32"),
        ({"attention_backend": "TRITON_ATTN"}, "attention_backend=TRITON_ATTN"),
    ],
)
def test_what_cannot_be_packed_is_refused(model_dir: Path, options: dict[str, Any], message: str) -> None:  # noqa: F811
    with pytest.raises((UsageError, RuntimeError), match=message):
        start(model_dir, CONFIG, **(OPTIONS | options))
