"""Models that mix full attention with sliding windows (gpt-oss) or chunks (Llama 4), whose groups vLLM manages.

In Gemma 4 the layers of full attention have other heads, and here blocks of twice as many tokens as the others.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from kvllm.compression.footprint import footprint
from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
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
from tests.engine.families import FAMILIES, HEAD_DIM, KEYS_AS_VALUES, MIXED, Family, prompts, save_random


@dataclass(frozen=True)
class Case:
    """num_blocks:  of the pool, one less than a request of max_model_len needs uncompressed
    local_blocks: that a decoding request holds at most in a local group: 128 tokens and two in flight
    num_prompts:  that are served together, and do not fit
    num_tokens:   of an answer: four windows and some
    """

    num_blocks: int
    local_blocks: int
    num_prompts: int = 5
    max_model_len: int = 512
    num_tokens: int = 330
    config: KvConfig = CONFIG
    block_size: int = BLOCK_SIZE


# 128 numbers in a window's keys of a token, 64 in those of the full layer.
GEMMA_4 = {"global_head_dim": 64, "max_position_embeddings": 768}
MODELS = {name: FAMILIES[name] for name in ("gpt-oss", "Llama 4")}
MODELS["Gemma 4"] = Family("Gemma 4", "gemma4_text", HEAD_DIM | MIXED | KEYS_AS_VALUES | GEMMA_4)
# Besides the 16 blocks of full attention, those of two groups with a window (127 tokens and one step's 64, anywhere in
# their blocks), or of three with a chunk (128 tokens and 64).
CASES = {
    "gpt-oss": Case(16 + 2 * 7 - 1, 6),
    "Llama 4": Case(16 + 3 * 6 - 1, 5),
    "Gemma 4": Case(
        12 + 2 * 7 - 1, 6, num_prompts=3, max_model_len=768, num_tokens=600,
        config=replace(CONFIG, window_size=128), block_size=2 * BLOCK_SIZE,
    ),
}  # fmt: skip

pytestmark = pytest.mark.engine
each = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def served(name: str, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder, case = tmp_path_factory.getbasetemp() / name, CASES[name]

    def start() -> Any:
        save_random(MODELS[name], folder)
        return engine(
            folder, case.config, max_model_len=case.max_model_len, skip_tokenizer_init=True, max_num_seqs=8,
            max_num_batched_tokens=64, num_gpu_blocks_override=case.num_blocks + 1,
        )  # fmt: skip

    llm = group_resources.get(name, start)
    llm.reset_prefix_cache()
    return group_resources.get(
        f"{name}, served", lambda: nullcontext(Served(llm, folder, case.num_tokens, case.block_size))
    )


@each
def test_requests_that_are_prefilled_in_chunks_compressed_preempted_and_resumed(
    name: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    before, seen = engine_stats(served.llm, reset_peak=True), watch_blocks(served.llm, monkeypatch)
    held = watch_local_groups(served.llm, monkeypatch)
    every = [*prompts(), [*prompts()[2], *prompts()[1]], prompts()[1][::-1]]  # 117 tokens: two chunks
    asked = every[-case.num_prompts :]
    outputs = served.greedy(*asked)
    after = engine_stats(served.llm)
    assert after["num_preemptions"] > before["num_preemptions"]
    assert {max(count for i, count in seen if i == req_id) for req_id, _ in seen} == {4}
    assert len(held) > case.num_prompts * case.num_tokens and max(held) <= case.local_blocks
    for prompt, output in zip(asked, outputs, strict=True):
        served.check(prompt, output, case.config)
    assert after["peak_kv_blocks"] <= case.num_blocks
    assert_pool_whole(served.llm)


@each
def test_a_prefix_cache_hit_and_a_request_that_is_not_compressed(name: str, served: Served) -> None:
    prompt = [*prompts()[2], *prompts()[1], *prompts()[2]]  # 194 tokens: longer than the window
    (first,) = served.greedy(prompt, num_tokens=8)
    (second,) = served.greedy(prompt)
    (full,) = served.greedy(prompt, num_tokens=120, kv_retention_ratio=1.0)  # perhaps with a hit, in so small a pool
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 192)
    served.check(prompt, second, CASES[name].config)
    served.check(prompt, full, None)
    assert_pool_whole(served.llm)


@each
def test_a_request_too_long_for_all_groups_together_is_refused(name: str, served: Served) -> None:
    """The refusal names the longest request that fits; one of that length is served."""
    prompt = [*prompts()[2], *prompts()[0]]
    case = CASES[name]
    needed = case.num_blocks + 1
    with pytest.raises(
        VLLMValidationError, match=rf"needs {needed} KV blocks.*has {needed - 1}\. Use a max_tokens of at"
    ) as e:
        served.greedy(prompt, num_tokens=case.max_model_len - len(prompt) - 1, kv_retention_ratio=1.0)
    most = int(str(e.value).partition("max_tokens of at most ")[2].partition(",")[0])
    assert len(prompt) + most == case.max_model_len - case.block_size
    (output,) = served.greedy(prompt, num_tokens=most, kv_retention_ratio=1.0)
    assert len(output.outputs[0].token_ids) == most
    assert_pool_whole(served.llm)


@each
def test_the_plan_counts_the_blocks_of_the_engine(name: str, served: Served) -> None:
    scheduler, case = scheduler_of(served.llm), CASES[name]
    planned = footprint(MODELS[name].config(), case.config, 8, max_model_len=case.max_model_len)
    assert planned.groups.scale * BLOCK_SIZE == case.block_size == scheduler.kv_block_size
    cache = scheduler.kv_cache_config
    assert planned.groups == scheduler.groups and planned.groups.num_local == len(cache.kv_cache_groups) - 1
    assert {t.size for t in cache.kv_cache_tensors} == {planned.kv_per_token * case.block_size * cache.num_blocks}
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
