"""A prompt cut to its budget: the engine equals the reference, in blocks of the request's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
from tests.engine.conftest import BLOCK_SIZE, assert_pool_whole, engine, small_words, watch_blocks
from tests.near_ties import check_greedy

pytestmark = pytest.mark.engine

CONFIG = KvConfig(
    method="cask", window_size=64, buffer_size=32, retention_ratio=0.5, request_ratios="1.0", prompt_budget=64
)
NUM_BLOCKS = 32  # a prompt of 300 tokens holds 10, and 13 just before it is cut


@pytest.fixture(scope="module")
def llm(small_model_dir: Path) -> Any:
    sizes = {"max_model_len": 1100, "num_gpu_blocks_override": NUM_BLOCKS + 1, "max_num_batched_tokens": 128}
    with engine(small_model_dir, CONFIG, max_num_seqs=4, **sizes) as made:
        yield made


def params(max_tokens: int, **extra: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra or None)


def test_a_cut_prompt_equals_the_reference_and_shares_nothing(
    llm: Any, small_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt is in the prefix cache, from an uncompressed twin. Beside it a short prompt stays whole."""
    prompt, short = small_words(300, seed=31), small_words(50, seed=32)
    uncompressed = params(30, kv_retention_ratio=1.0)
    first = llm.generate([{"prompt_token_ids": prompt}], uncompressed, use_tqdm=False)[0]
    before, seen = engine_stats(llm), watch_blocks(llm, monkeypatch)
    texts = [prompt, short]
    outputs = llm.generate([{"prompt_token_ids": p} for p in texts], params(230), use_tqdm=False)
    monkeypatch.undo()
    after = engine_stats(llm)
    again = llm.generate([{"prompt_token_ids": prompt}], uncompressed, use_tqdm=False)[0]
    # It neither found nor changed the nine full blocks that its twin finds before and after.
    assert (outputs[0].num_cached_tokens, again.num_cached_tokens) == (0, 288)
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    for text, output in zip(texts, outputs, strict=True):
        check_greedy(small_reference, text, list(output.outputs[0].token_ids), CONFIG, BLOCK_SIZE, num_variants=0)
    assert after["num_prompts_cut"] - before["num_prompts_cut"] == 1
    # Ten blocks of the prompt become two, and two of a window one: the long text has two windows, the short one too.
    assert after["num_windows_compressed"] - before["num_windows_compressed"] == 4
    assert after["num_blocks_freed"] - before["num_blocks_freed"] == 8 + 4
    assert max(events for _, events in seen) == 2
    assert_pool_whole(llm)


def test_a_cut_prompt_is_not_in_the_prefix_cache(llm: Any) -> None:
    prompt = small_words(300, seed=36)
    llm.generate([{"prompt_token_ids": prompt}], params(120), use_tqdm=False)
    twin = llm.generate([{"prompt_token_ids": prompt}], params(1, kv_retention_ratio=1.0), use_tqdm=False)[0]
    assert twin.num_cached_tokens == 0


def test_a_preempted_request_is_cut_again(llm: Any, small_reference: Any) -> None:
    """Preempted before its first event, after it, and after the second: three cuts, and one answer."""
    prompt, steps, engine_core = small_words(300, seed=33), 0, llm.llm_engine
    before = engine_stats(llm)
    engine_core.add_request("preempted", {"prompt_token_ids": prompt}, params(230))
    while engine_core.has_unfinished_requests():
        (*_, output) = engine_core.step() or [None]
        steps += 1
        if steps in (50, 150, 210):
            assert engine_core.reset_prefix_cache(reset_running_requests=True)
    after = engine_stats(llm)
    assert output is not None and output.finished
    assert after["num_preemptions"] - before["num_preemptions"] == 3
    assert after["num_prompts_cut"] - before["num_prompts_cut"] == 3
    check_greedy(small_reference, prompt, list(output.outputs[0].token_ids), CONFIG, BLOCK_SIZE, num_variants=0)
    assert_pool_whole(llm)


def test_a_request_too_short_to_be_cut_uses_the_prefix_cache(llm: Any) -> None:
    prompt = small_words(200, seed=35)
    for expected in (0, 192):
        output = llm.generate([{"prompt_token_ids": prompt}], params(20), use_tqdm=False)[0]
        assert output.num_cached_tokens == expected


def test_a_prompt_that_fills_the_pool_before_it_is_cut_is_refused(llm: Any) -> None:
    message = (
        r"prefix_budget_exhausted: a prompt of 950 tokens .*prompt_budget=64 after 106 .*33 KV blocks.*has 32.*most 74"
    )
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate([{"prompt_token_ids": small_words(950)}], params(75), use_tqdm=False)
    llm.generate([{"prompt_token_ids": small_words(950)}], params(74), use_tqdm=False)
    assert_pool_whole(llm)
