"""Models that mix full attention with sliding windows (gpt-oss) or chunks (Llama 4), whose groups vLLM manages."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from kvllm.compression.footprint import footprint
from kvllm.engine.stats import engine_stats
from kvllm.layers import Local
from tests.conftest import group_resources
from tests.engine.conftest import (
    BLOCK_SIZE,
    CONFIG,
    Served,
    assert_pool_whole,
    compressor_of,
    engine,
    scheduler_of,
    watch_blocks,
)
from tests.engine.families import FAMILIES, prompts, save_random

MAX_MODEL_LEN = 512
NUM_TOKENS = 330  # four windows and some
LOCAL = {"gpt-oss": Local(128), "Llama 4": Local(128, chunked=True)}
# One less than a request of MAX_MODEL_LEN needs uncompressed: 16 blocks, and those of two groups with a window (127
# tokens and one step's 64, anywhere in their blocks), or of three with a chunk (128 tokens and 64).
NUM_BLOCKS = {"gpt-oss": 16 + 2 * 7 - 1, "Llama 4": 16 + 3 * 6 - 1}

pytestmark = pytest.mark.engine
each = pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in LOCAL])


@pytest.fixture
def served(name: str, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.getbasetemp() / name

    def start() -> Any:
        save_random(FAMILIES[name], folder)
        return engine(
            folder, CONFIG, max_model_len=MAX_MODEL_LEN, skip_tokenizer_init=True, max_num_seqs=8,
            max_num_batched_tokens=64, num_gpu_blocks_override=NUM_BLOCKS[name] + 1,
        )  # fmt: skip

    llm = group_resources.get(name, start)
    llm.reset_prefix_cache()
    return group_resources.get(f"{name}, served", lambda: nullcontext(Served(llm, folder, NUM_TOKENS)))


@each
def test_requests_that_are_prefilled_in_chunks_compressed_preempted_and_resumed(
    name: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = engine_stats(served.llm, reset_peak=True), watch_blocks(served.llm, monkeypatch)
    held = watch_local_groups(served.llm, monkeypatch)
    asked = [*prompts(), [*prompts()[2], *prompts()[1]], prompts()[1][::-1]]  # 117 tokens: two chunks
    outputs = served.greedy(*asked)
    after = engine_stats(served.llm)
    assert after["num_preemptions"] > before["num_preemptions"]
    assert {max(count for i, count in seen if i == req_id) for req_id, _ in seen} == {4}
    assert len(held) > 5 * NUM_TOKENS and max(held) <= (6 if name == "gpt-oss" else 5)  # 128 tokens and two in flight
    for prompt, output in zip(asked, outputs, strict=True):
        served.check(prompt, output)
    assert after["peak_kv_blocks"] <= NUM_BLOCKS[name]
    assert_pool_whole(served.llm)


@each
def test_a_prefix_cache_hit_and_a_request_that_is_not_compressed(name: str, served: Served) -> None:
    prompt = [*prompts()[2], *prompts()[1], *prompts()[2]]  # 194 tokens: longer than the window
    (first,) = served.greedy(prompt, num_tokens=8)
    (second,) = served.greedy(prompt)
    (full,) = served.greedy(prompt, num_tokens=120, kv_retention_ratio=1.0)  # perhaps with a hit, in so small a pool
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 192)
    served.check(prompt, second)
    served.check(prompt, full, None)
    assert_pool_whole(served.llm)


@each
def test_a_request_too_long_for_all_groups_together_is_refused(name: str, served: Served) -> None:
    """The refusal names the longest request that fits; one of that length is served."""
    prompt = [*prompts()[2], *prompts()[0]]
    needed = NUM_BLOCKS[name] + 1
    with pytest.raises(
        VLLMValidationError, match=rf"needs {needed} KV blocks.*has {needed - 1}\. Use a max_tokens of at"
    ) as e:
        served.greedy(prompt, num_tokens=MAX_MODEL_LEN - len(prompt) - 1, kv_retention_ratio=1.0)
    most = int(str(e.value).partition("max_tokens of at most ")[2].partition(",")[0])
    assert len(prompt) + most == MAX_MODEL_LEN - BLOCK_SIZE
    (output,) = served.greedy(prompt, num_tokens=most, kv_retention_ratio=1.0)
    assert len(output.outputs[0].token_ids) == most
    assert_pool_whole(served.llm)


@each
def test_the_plan_counts_the_blocks_of_the_engine(name: str, served: Served) -> None:
    scheduler = scheduler_of(served.llm)
    planned = footprint(FAMILIES[name].config(), CONFIG, 8, max_model_len=MAX_MODEL_LEN)
    cache = scheduler.kv_cache_config
    assert planned.groups == scheduler.groups and planned.groups.num_local == len(cache.kv_cache_groups) - 1
    assert {t.size for t in cache.kv_cache_tensors} == {planned.kv_per_token * BLOCK_SIZE * cache.num_blocks}
    assert planned.query_bank == compressor_of(served.llm).state.bank.num_bytes


def watch_local_groups(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every later step check that local groups hold no more blocks than under stock vLLM.

    returns a list that gets the blocks that each decoding request holds in each local group, step by step
    """
    scheduler = scheduler_of(llm)
    managers = [
        m for m in scheduler.kv_cache_manager.coordinator.single_type_managers if m not in scheduler.kv_managers
    ]
    original, seen = scheduler.schedule, []

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        for request in scheduler.running:
            new = output.num_scheduled_tokens.get(request.request_id, 0)
            for manager in managers:
                held = sum(not block.is_null for block in manager.req_to_blocks[request.request_id])
                settled = max(0, request.num_computed_tokens - 3)  # the step's own token, and one of a step in flight
                stock = -(-request.num_computed_tokens // BLOCK_SIZE)
                stock -= manager.get_num_skipped_tokens(settled) // BLOCK_SIZE
                if new == 1:
                    assert held <= stock
                    seen.append(held)
                assert held <= manager.max_admission_blocks_per_request
        return output

    monkeypatch.setattr(scheduler, "schedule", schedule)
    return seen
