"""Prompts that leave the GPU's prefix cache come back from host memory, beside compression. Needs a GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from vllm import LLM

from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
from tests.gpu.test_engine_gpu import CONFIG, check, greedy, model_dir, prompt, reference_model, start  # noqa: F401
from tests.gpu.test_packed_gpu import CONFIG as PACKED
from tests.gpu.test_packed_gpu import OPTIONS as PACKED_OPTIONS
from tests.gpu.test_packed_gpu import summary
from tests.near_ties import greedy_losses
from tests.random_traffic import run_traffic

pytestmark = pytest.mark.engine

HOST_GIB = 1 / 32  # 512 blocks of this model in float32, twice as many in 16 bits
NUM_TOKENS = 400
LENGTHS = (300, 200, 176, 100, 64, 17)  # prompts; 64 and 176 are whole blocks: a full hit computes one token again


def offloading(model_dir: Path, config: KvConfig, **options: Any) -> LLM:  # noqa: F811
    return start(model_dir, config, kv_offloading_size=HOST_GIB, **options)


def hits(llm: LLM) -> tuple[int, int]:
    """Prompt tokens found in host memory, by vLLM's own counters, and those found on the GPU."""
    found = {m.name: m.value for m in llm.get_metrics() if m.name.endswith("prefix_cache_hits")}
    return int(found["vllm:external_prefix_cache_hits"]), int(found["vllm:prefix_cache_hits"])


def evict(llm: LLM) -> None:
    """Fill the GPU's pool with other prompts, one after the other, so that nothing of before is left there."""
    for seed in range(900, 906):
        greedy(llm, [prompt(600, seed)], 1)


def served_twice(llm: LLM, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Answers of all prompts at once in a pool that they overfill, then again after they have left the GPU."""
    first = greedy(llm, prompts, num_tokens)
    evict(llm)
    (external, local), before = hits(llm), engine_stats(llm)
    again = greedy(llm, prompts, num_tokens)
    (external_now, local_now), after = hits(llm), engine_stats(llm)
    print("host hits:", external_now - external, "GPU hits:", local_now - local, after)
    assert external_now - external >= sum(len(p) // 16 * 16 for p in prompts) // 2
    assert after["num_windows_compressed"] - before["num_windows_compressed"] >= 2 * len(prompts)
    assert after["free_kv_blocks"] == after["num_kv_blocks"]
    return first, again


def test_equals_the_reference(model_dir: Path, reference_model: Any) -> None:  # noqa: F811
    """Preempted requests, aborts and random arrivals among what is stored and loaded; every answer is checked."""
    llm = offloading(model_dir, CONFIG, num_gpu_blocks_override=90)
    prompts = [prompt(n, n) for n in LENGTHS]
    for outputs in served_twice(llm, prompts, NUM_TOKENS):
        ties = sum(check(reference_model, p, o).near_ties for p, o in zip(prompts, outputs, strict=True))
        print("near ties:", ties)
    (full,) = greedy(llm, prompts[1:2], 300, ratio=1.0)
    check(reference_model, prompts[1], full, None)

    rng, before, external = random.Random(0), engine_stats(llm), hits(llm)[0]
    # Twenty prompts, each asked five times, so that copies in both directions run beside events and preemptions.
    texts = {str(i): prompt(80 + 11 * (i % 20), i % 20) for i in range(100)}
    lengths = {i: rng.randrange(10, 300) for i in texts}
    answers, aborted = run_traffic(
        llm.llm_engine, texts, lengths, rng, lambda *_: rng.randrange(0, 3), abort_chance=0.01, detokenize=False
    )
    after = engine_stats(llm)
    print("traffic: host hits", hits(llm)[0] - external, "preemptions",
          after["num_preemptions"] - before["num_preemptions"], "aborted", len(aborted))  # fmt: skip
    assert hits(llm)[0] > external and after["num_preemptions"] > before["num_preemptions"] and aborted
    assert after["free_kv_blocks"] == after["num_kv_blocks"]
    for i in sorted(set(answers) - aborted):
        assert len(answers[i]) == lengths[i]
        check(reference_model, texts[i], answers[i])
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("cache_dtype, block_size, num_blocks", [("auto", 16, 100), ("fp8", 32, 60)])
def test_packed_survivors(
    model_dir: Path, reference_model: Any, cache_dtype: str, block_size: int, num_blocks: int  # noqa: F811
) -> None:  # fmt: skip
    """A prompt that came back serves as well as one that was computed."""
    options = {"kv_cache_dtype": cache_dtype, "block_size": block_size, "num_gpu_blocks_override": num_blocks}
    llm = offloading(model_dir, PACKED, **(PACKED_OPTIONS | options))
    prompts = [prompt(n, n) for n in LENGTHS]
    answers = served_twice(llm, prompts, 600)
    llm.llm_engine.engine_core.shutdown()
    computed, loaded = (
        torch.cat(
            [
                greedy_losses(reference_model, p, o, PACKED, block_size, packed=True, cache_dtype=cache_dtype)
                for p, o in zip(prompts, outputs, strict=True)
            ]
        ).cpu()
        for outputs in answers
    )
    print(cache_dtype, "computed:", summary(computed), "| loaded:", summary(loaded))
    assert loaded.mean() < 1.5 * computed.mean() + 1e-3
