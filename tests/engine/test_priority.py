"""Requests with higher priority preempt others and take over their rows of the query bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from kvllm.engine.stats import engine_stats
from tests.engine.conftest import (
    BLOCK_SIZE,
    CONFIG,
    assert_pool_whole,
    compressor_of,
    engine,
    small_words,
    watch_blocks,
)
from tests.near_ties import check_greedy

pytestmark = pytest.mark.engine

NUM_TOKENS = 200  # two events each


@pytest.fixture(scope="module")
def llm(small_model_dir: Path) -> Any:
    # 8 blocks, of which each request below needs 5: the two that may run preempt each other.
    with engine(
        small_model_dir, scheduling_policy="priority", max_num_seqs=2, num_gpu_blocks_override=9, max_model_len=256
    ) as made:
        yield made


def test_urgent_requests_arrive_while_all_rows_are_taken(
    llm: Any, small_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a preempted request waits, its row belongs to another request."""
    seen = watch_blocks(llm, monkeypatch)
    core, outputs, num_steps = llm.llm_engine, {}, 0
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = {name: small_words(20, seed=seed) for seed, name in enumerate("abcd", start=40)}

    def arrive(names: str, priority: int) -> None:
        for name in names:
            core.add_request(name, {"prompt_token_ids": prompts[name]}, params, priority=priority)

    arrive("ab", 1)
    while core.has_unfinished_requests():
        if num_steps == 20:
            arrive("cd", 0)
        for output in core.step():
            if output.finished:
                outputs[output.request_id] = list(output.outputs[0].token_ids)
        num_steps += 1
    assert engine_stats(llm)["num_preemptions"] > 0
    assert len({req_id for req_id, _ in seen}) == 4 and max(events for _, events in seen) == 2
    assert list(outputs)[-1] in "ab"  # c and d overtook one of them
    for name, prompt in prompts.items():
        assert len(outputs[name]) == NUM_TOKENS
        check_greedy(small_reference, prompt, outputs[name], CONFIG, BLOCK_SIZE, num_variants=0)
    assert_pool_whole(llm)


def test_nothing_is_kept_of_preempted_and_finished_requests(llm: Any) -> None:
    """No rows or blocks remain of finished requests, nor of preempted ones that were aborted."""
    core, compressor = llm.llm_engine, compressor_of(llm)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for name in ("first", "second"):
        core.add_request(name, {"prompt_token_ids": small_words(20, seed=50)}, params)
    while engine_stats(llm)["num_running"] < 2:
        core.step()
    before = engine_stats(llm)["num_preemptions"]
    while engine_stats(llm)["num_preemptions"] == before:
        core.step()
    assert len(compressor.running) == 1
    core.abort_request(["first", "second"])
    core.add_request("third", {"prompt_token_ids": small_words(20, seed=51)}, params)
    core.step()
    assert len(compressor.running) == 1
    core.abort_request(["third"])
    while core.has_unfinished_requests():
        core.step()
    assert_pool_whole(llm)
