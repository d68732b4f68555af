"""Invariant 2: greedy tokens of the engine equal the reference's, in float32."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from kvllm.engine.stats import engine_stats
from tests.engine.conftest import BLOCK_SIZE, CONFIG, assert_pool_whole, words
from tests.near_ties import check_greedy

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("shared engine")]

NUM_TOKENS = 270  # three windows and some


@pytest.fixture(scope="module")
def llm(shared_llm: Any) -> Any:
    return shared_llm


def greedy(llm: Any, prompts: list[list[int]], num_tokens: int = NUM_TOKENS, **extra: Any) -> list[Any]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, extra_args=extra or None)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


@pytest.fixture(scope="module")
def batch(llm: Any) -> dict[str, Any]:
    """One batch of prompts with lengths around block boundaries; the longest is prefilled while others decode."""
    prompts = [words(n, seed=n) for n in (1, 15, 16, 17, 31, 32, 33, 500)]
    before = engine_stats(llm)
    answers = [list(output.outputs[0].token_ids) for output in greedy(llm, prompts)]
    after = engine_stats(llm)
    counted = {name: after[name] - before[name] for name in ("num_windows_compressed", "num_blocks_freed")}
    return {"prompts": prompts, "answers": answers} | counted


def test_prompts_around_block_borders_in_one_batch_with_chunked_prefill(
    llm: Any, batch: dict[str, Any], reference_model: Any
) -> None:
    prompts, answers = batch["prompts"], batch["answers"]
    ties = sum(
        check_greedy(reference_model, prompt, answer, CONFIG, BLOCK_SIZE, num_variants=0).near_ties
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    assert ties <= 2
    # Every request passes the events at P' + 96, 160 and 224 of its 270 tokens.
    assert batch["num_windows_compressed"] == batch["num_blocks_freed"] == 3 * len(prompts)
    assert_pool_whole(llm)


@pytest.mark.parametrize("index", [3, 6])
def test_same_tokens_alone_as_in_a_batch(llm: Any, batch: dict[str, Any], index: int) -> None:
    """Invariant 6, as visible in the tokens, over more than two windows."""
    (alone,) = greedy(llm, [batch["prompts"][index]], 210)
    assert list(alone.outputs[0].token_ids) == batch["answers"][index][:210]


def test_prefix_cache_hit(llm: Any, reference_model: Any) -> None:
    prompt = words(200, seed=7)
    greedy(llm, [prompt], 8)
    (output,) = greedy(llm, [prompt])
    assert output.num_cached_tokens == 192
    check_greedy(reference_model, prompt, list(output.outputs[0].token_ids), CONFIG, BLOCK_SIZE, num_variants=0)


def test_ratios_mix_in_a_batch(llm: Any, reference_model: Any) -> None:
    prompt = words(40, seed=3)
    params = [
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args={"kv_retention_ratio": r})
        for r in (1.0, 0.5)
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * 2, params, use_tqdm=False)
    full, half = (list(o.outputs[0].token_ids) for o in outputs)
    check_greedy(reference_model, prompt, full, None, BLOCK_SIZE, num_variants=0)
    check_greedy(reference_model, prompt, half, CONFIG, BLOCK_SIZE, num_variants=0)
    assert full != half
    assert_pool_whole(llm)
