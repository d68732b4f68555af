"""Requests that are preempted, resumed, aborted: all correct, and the pool whole (invariants 2 and 5)."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from kvllm.engine.stats import engine_stats
from tests.engine.conftest import BLOCK_SIZE, assert_pool_whole, engine, small_words, watch_blocks
from tests.engine.conftest import CONFIG as WINDOWS
from tests.near_ties import check_greedy
from tests.random_traffic import run_traffic

pytestmark = pytest.mark.engine

# Only requests of more than four windows notice the limit: at events 4, 6, 8, ... their history is compressed too.
CONFIG = replace(WINDOWS, history_size=128)
NUM_REQUESTS = 64


@pytest.fixture(scope="module")
def llm(small_model_dir: Path) -> Any:
    # 22 blocks: two or three of the requests below, of the eight that may run.
    sizes = {"num_gpu_blocks_override": 23, "max_num_seqs": 8, "max_num_batched_tokens": 128}
    with engine(small_model_dir, CONFIG, **sizes) as made:
        yield made


def test_random_traffic(llm: Any, small_reference: Any) -> None:
    """64 requests with random arrival, lengths and aborts, in a pool so small that they preempt each other."""
    rng = random.Random(0)
    prompts = {str(i): small_words(rng.choice([1, 15, 16, 17, 33, 60]), seed=i) for i in range(NUM_REQUESTS)}
    lengths = {i: rng.choice([5, 40, 130, 500]) for i in prompts}  # admission foresees what 180 tokens need

    def arrivals(num_waiting: int, num_running: int) -> int:
        return 4 if num_waiting and (rng.random() < 0.2 or not num_running) else 0

    outputs, aborted = run_traffic(llm.llm_engine, prompts, lengths, rng, arrivals, abort_chance=0.02)
    stats = engine_stats(llm)
    assert stats["num_preemptions"] > 0 and aborted
    assert_pool_whole(llm)
    finished = sorted(set(outputs) - aborted)
    assert len(finished) + len(aborted) == NUM_REQUESTS
    assert all(len(outputs[i]) == lengths[i] for i in finished)
    # The long ones were compressed, and are the ones that were preempted; every one of them is checked.
    for i in (i for i in finished if lengths[i] >= 130):
        check_greedy(small_reference, prompts[i], outputs[i], CONFIG, BLOCK_SIZE, num_variants=0)


def test_preempted_requests_never_need_their_uncompressed_length(
    llm: Any, small_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request of 800 tokens needs 25 blocks uncompressed and has 22; three of them preempt each other.

    Their histories are compressed again and again, and once more when a preempted one is resumed.
    """
    prompts = [small_words(20, seed=seed) for seed in (90, 91, 92)]
    seen = watch_blocks(llm, monkeypatch)
    params = SamplingParams(temperature=0, max_tokens=780, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    events: dict[str, list[int]] = {}
    for req_id, count in seen:
        events.setdefault(req_id, []).append(count)
    assert len(events) == 3 and all(max(counts) == 11 for counts in events.values())
    # A request that was preempted starts anew. After event 4 its history had been compressed, and will be again.
    assert any(now < before > 4 for counts in events.values() for before, now in pairwise(counts))
    for prompt, output in zip(prompts, outputs, strict=True):
        check_greedy(small_reference, prompt, list(output.outputs[0].token_ids), CONFIG, BLOCK_SIZE, num_variants=0)
    assert_pool_whole(llm)


def test_a_request_that_can_never_fit_is_refused(llm: Any) -> None:
    """Uncompressed, 800 tokens do not fit the pool: refused when it arrives, with the remedy, and nothing is lost."""
    params = SamplingParams(temperature=0, max_tokens=780, ignore_eos=True, extra_args={"kv_retention_ratio": 1.0})
    with pytest.raises(VLLMValidationError, match=r"max_tokens=780.*needs 25 KV blocks.*has 22.*at most 684"):
        llm.generate([{"prompt_token_ids": small_words(20)}], params, use_tqdm=False)
    assert_pool_whole(llm)


def test_parallel_samples_share_a_prompt(llm: Any, small_reference: Any) -> None:
    """n=3: the samples share prompt blocks, which none of them writes."""
    prompt = small_words(70, seed=4)
    # top_k=1 is greedy; vLLM refuses n > 1 at temperature 0.
    params = SamplingParams(n=3, temperature=1, top_k=1, max_tokens=200, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    samples = [list(o.token_ids) for o in output.outputs]
    assert len(samples) == 3
    for sample in samples:
        check_greedy(small_reference, prompt, sample, CONFIG, BLOCK_SIZE, num_variants=0)
    assert_pool_whole(llm)
