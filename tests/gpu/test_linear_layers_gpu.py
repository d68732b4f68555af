"""Mamba layers beside layers of full attention (Granite-4-H), in the V2 runner under CUDA graphs. Needs a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers import GraniteMoeHybridConfig
from vllm import LLM, SamplingParams

from kvllm.compression.blocks import blocks_held
from kvllm.engine.stats import engine_stats
from kvllm.reference import load_model
from tests.gpu.test_engine_gpu import CONFIG, check, greedy, prompt, start
from tests.models import GRANITE_HYBRID, save_random_model
from tests.random_traffic import run_traffic

pytestmark = pytest.mark.engine

# Small enough for preemption: a request holds two to four blocks of attention and three to six of states.
NUM_BLOCKS = 60


@pytest.fixture(scope="module", autouse=True)
def exact_convolutions() -> Iterator[None]:
    """The reference's convolutions would round to tf32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Any]]:
    folder = save_random_model(tmp_path_factory.mktemp("granite"), GraniteMoeHybridConfig, **GRANITE_HYBRID)
    llm = start(folder, replace(CONFIG, request_ratios="0.25,1.0"), num_gpu_blocks_override=NUM_BLOCKS)
    yield llm, load_model(folder, device="cuda")
    llm.llm_engine.engine_core.shutdown()


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def check_pool(llm: LLM) -> None:
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def traffic(llm: LLM) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """200 requests of random lengths, aborts among them, in a pool too small for those that run: prompts, outputs."""
    rng, before = random.Random(0), engine_stats(llm)
    texts = {str(i): prompt(rng.randrange(1, 300), i) for i in range(200)}
    lengths = {i: rng.randrange(10, 600) for i in texts}
    outputs, aborted = run_traffic(
        llm.llm_engine, texts, lengths, rng, lambda *_: rng.randrange(0, 3), abort_chance=0.01, detokenize=False
    )
    after = engine_stats(llm)
    print("preemptions:", after["num_preemptions"] - before["num_preemptions"], "aborted:", len(aborted))
    assert after["num_preemptions"] > before["num_preemptions"] and aborted
    check_pool(llm)
    finished = sorted(set(outputs) - aborted)
    assert len(finished) + len(aborted) >= 200 and all(len(outputs[i]) == lengths[i] for i in finished)
    return {i: texts[i] for i in finished[::4]}, {i: outputs[i] for i in finished[::4]}


def test_mamba_equals_reference(granite: tuple[LLM, Any]) -> None:
    """Four windows and more of each request; the second time part of the longest prompt comes from the prefix cache."""
    llm, model = granite
    scheduler = scheduler_of(llm)
    specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
    print([(type(spec).__name__, spec.block_size) for spec in specs])
    assert scheduler.block_size > 16
    prompts = [prompt(n, n) for n in (1, 16, 17, 100, 300, 600)]
    for p, output in zip(prompts, greedy(llm, prompts, 400), strict=True):
        check(model, p, output)
    assert engine_stats(llm)["num_windows_compressed"] >= 4 * len(prompts)
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, detokenize=False)
    (again,) = llm.generate([{"prompt_token_ids": prompts[-1]}], params, use_tqdm=False)
    print("cached:", again.num_cached_tokens)
    assert again.num_cached_tokens and again.num_cached_tokens >= scheduler.block_size
    check(model, prompts[-1], list(again.outputs[0].token_ids))
    (full,) = greedy(llm, prompts[4:5], 300, ratio=1.0)
    check(model, prompts[4], full, None)
    check_pool(llm)


def test_blocks_are_freed_by_the_arithmetic(granite: tuple[LLM, Any]) -> None:
    """One request, step by step: its blocks of attention are those of `blocks_held`, up to the steps in flight."""
    llm, _ = granite
    scheduler, engine = scheduler_of(llm), llm.llm_engine
    manager, size, prompt_len, num_tokens = scheduler.kv_managers[0], scheduler.block_size, 300, 1700
    geometry = scheduler.geometries.of_ratio(0.25)
    params = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False,
        extra_args={"kv_retention_ratio": 0.25},
    )  # fmt: skip
    engine.add_request("one", {"prompt_token_ids": prompt(prompt_len, 9)}, params)
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        for name, request in scheduler.requests.items():
            held = sum(not block.is_null for block in manager.req_to_blocks[name])
            around = np.arange(request.num_computed_tokens - 4, request.num_computed_tokens + 2)
            expected = blocks_held(geometry, np.full(6, prompt_len), around, size)
            assert expected.min() - 1 <= held <= expected.max()
            most = max(most, held)
    whole = -(-(prompt_len + num_tokens) // size)
    print("blocks of", size, "tokens at the peak:", most, "uncompressed:", whole)
    assert most <= 0.8 * whole
    check_pool(llm)


def test_mamba_in_random_traffic(granite: tuple[LLM, Any]) -> None:
    llm, model = granite
    texts, outputs = traffic(llm)
    matches = [check(model, texts[i], outputs[i]) for i in texts]
    near = sum(match.variant is not None for match in matches)
    print("near ties among survivors:", near, "of", len(matches), "requests")
    assert near <= len(matches) // 10
