"""Invariants 3 to 5 inside a running engine, and known bugs of other implementations, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from kvllm.engine.stats import engine_stats
from tests.engine.conftest import (
    BLOCK_SIZE,
    CONFIG,
    SHARED,
    assert_pool_whole,
    compressor_of,
    engine,
    scheduler_of,
    small_words,
    watch_blocks,
)
from tests.near_ties import check_greedy

pytestmark = pytest.mark.engine

METHODS = replace(CONFIG, request_methods={"random": {}, "snapkv": {"kernel_size": 3}, "cask": {}})


@pytest.fixture(scope="module")
def llm(small_model_dir: Path) -> Any:
    with engine(small_model_dir, METHODS, **SHARED) as made:
        yield made


def params(max_tokens: int, **extra: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra or None)


def run(
    llm: Any, requests: dict[str, tuple[list[int], SamplingParams]], each_step: Callable[[], None]
) -> dict[str, list[int]]:
    """Run requests to their end, calling `each_step` after every step."""
    for request_id, (prompt, sampling) in requests.items():
        llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
    outputs = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                outputs[output.request_id] = list(output.outputs[0].token_ids)
        each_step()
    return outputs


def test_scheduler_and_worker_agree_at_every_step(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 3: the blocks that attention reads are the scheduler's live ones."""
    seen = watch_blocks(llm, monkeypatch)
    requests = {f"agree-{n}": (small_words(n, seed=n), params(200)) for n in (5, 32, 100)}
    run(llm, requests, lambda: None)
    assert (
        len(seen) == 601 and max(events for _, events in seen) == 2
    )  # 200 steps each, and one more chunk of the longest prompt


def test_evicted_blocks_return_to_the_pool_while_the_request_runs(llm: Any) -> None:
    """Peer bug: evicted blocks were never freed. The pool shrinks by the compressed size alone."""
    scheduler = scheduler_of(llm)
    pool, used = scheduler.kv_cache_manager.block_pool, []

    def note() -> None:
        for request in scheduler.running:
            geometry, _ = scheduler._compressed(request.request_id)
            length = geometry.physical_len(request.num_prompt_tokens, request.num_computed_tokens - 1) + 1
            used.append((pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), -(-length // BLOCK_SIZE)))

    run(llm, {"frees": (small_words(20, seed=1), params(300))}, note)
    assert len(used) == 299 and all(expected == held for held, expected in used)
    assert max(held for held, _ in used) == 7 and -(-320 // BLOCK_SIZE) == 10
    assert_pool_whole(llm)


def cached_blocks(llm: Any) -> dict[int, bytes]:
    """The contents of every block in the prefix cache, by block id."""
    manager = scheduler_of(llm).kv_cache_manager
    layers = compressor_of(llm).layers
    found = {}
    for block in manager.block_pool.blocks:
        if block.block_hash is not None:
            found[block.block_id] = b"".join(layer.kv_cache[block.block_id].numpy().tobytes() for layer in layers)
    return found


def test_shared_blocks_are_never_written(llm: Any) -> None:
    """Invariant 4: prefix-cached blocks keep their contents while requests that share them are compressed."""
    prompt = small_words(100, seed=2)
    run(llm, {"first": (prompt, params(4))}, lambda: None)
    before = cached_blocks(llm)
    assert len(before) >= 3
    run(llm, {f"sharing-{i}": (prompt + small_words(i, seed=i), params(200)) for i in (1, 2, 3)}, lambda: None)
    after = cached_blocks(llm)
    assert all(after[block] == contents for block, contents in before.items() if block in after)
    assert set(before) & set(after)


def test_a_compressed_block_is_never_found_by_another_request(llm: Any, small_reference: Any) -> None:
    """Peer bug: the prefix cache served a compressed block. A prompt that repeats an answer finds only the prompt."""
    prompt = small_words(64, seed=11)
    answer = run(llm, {"asks": (prompt, params(200))}, lambda: None)["asks"]
    again = prompt + answer[:150]
    outputs = llm.generate([{"prompt_token_ids": again}], params(120), use_tqdm=False)
    assert outputs[0].num_cached_tokens == 64
    check_greedy(small_reference, again, list(outputs[0].outputs[0].token_ids), CONFIG, BLOCK_SIZE, num_variants=0)


def test_generated_tokens_of_a_compressed_request_have_no_hashes(llm: Any) -> None:
    """A resumed request must not adopt, and then overwrite, the blocks of an uncompressed twin."""
    prompt, seen = small_words(70, seed=12), set()
    scheduler = scheduler_of(llm)

    def note() -> None:
        for request in scheduler.running:
            ratio = request.sampling_params.extra_args["kv_retention_ratio"]
            seen.add((ratio, len(request.block_hashes)))

    twins = {f"twin-{r}": (prompt, params(150, kv_retention_ratio=r)) for r in (1.0, 0.5)}
    run(llm, twins, note)
    assert {n for r, n in seen if r == 0.5} == {2}  # 70 prompt tokens are two full blocks
    assert max(n for r, n in seen if r == 1.0) == 6


def test_nothing_is_compressed_during_prefill_nor_by_absolute_length(llm: Any) -> None:
    """Peer bugs: compaction between prefill chunks; a trigger on prompt plus generated length."""
    before = engine_stats(llm)["num_windows_compressed"]
    run(llm, {"long": (small_words(500, seed=13), params(90))}, lambda: None)
    assert engine_stats(llm)["num_windows_compressed"] == before


def test_queries_are_captured_in_mixed_batches(llm: Any, small_reference: Any) -> None:
    """Peer bug: the observation window stayed empty where prefill and decode shared a batch."""
    prompt = small_words(40, seed=14)
    core = llm.llm_engine
    core.add_request("decodes", {"prompt_token_ids": prompt}, params(200))
    output, steps = [], 0
    while core.has_unfinished_requests():
        steps += 1
        if steps % 3 == 0 and steps < 180:  # a prefill beside nearly every decode
            core.add_request(f"prefills-{steps}", {"prompt_token_ids": small_words(90, seed=steps)}, params(1))
        for result in core.step():
            if result.request_id == "decodes" and result.finished:
                output = list(result.outputs[0].token_ids)
    check_greedy(small_reference, prompt, output, CONFIG, BLOCK_SIZE, num_variants=0)


def test_methods_mix_in_a_batch(llm: Any, small_reference: Any) -> None:
    """Each answer is what the reference gives with that method, and no two are alike."""
    prompt = small_words(40, seed=17)
    requests = {name: (prompt, params(230, kv_method=name)) for name in METHODS.methods}
    requests["full"] = (prompt, params(230, kv_method="random", kv_retention_ratio=1.0))
    requests["default"] = (prompt, params(230))
    answers = run(llm, requests, lambda: None)
    assert answers.pop("default") == answers["kara"]
    assert len({tuple(answer) for answer in answers.values()}) == len(answers) == 5
    check_greedy(small_reference, prompt, answers.pop("full"), None, BLOCK_SIZE, num_variants=0)
    for name, answer in answers.items():
        check_greedy(small_reference, prompt, answer, METHODS.of_method(name), BLOCK_SIZE, num_variants=0)
    assert_pool_whole(llm)


def test_the_sequences_of_a_request_have_its_method(llm: Any) -> None:
    compressor, core, seen = compressor_of(llm), llm.llm_engine, set()
    sampling = SamplingParams(n=2, seed=7, max_tokens=4, ignore_eos=True, extra_args={"kv_method": "random"})
    core.add_request("two", {"prompt_token_ids": small_words(10)}, sampling)
    core.add_request("one", {"prompt_token_ids": small_words(10)}, params(4))
    while core.has_unfinished_requests():
        core.step()
        seen |= {
            (name.split("-")[0], compressor.state.rows.methods[compressor.running[name]]) for name in compressor.running
        }
    assert sorted(method for _, method in seen) == ["kara", "random", "random"]


def test_rope_positions_are_logical(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peer bug: RoPE positions were taken from the compacted length."""
    compressor = compressor_of(llm)
    original, positions = compressor.begin_step, []

    def begin_step(scheduled: dict[str, int]) -> None:
        original(scheduled)
        positions.append(int(compressor.runner.positions[0]))

    monkeypatch.setattr(compressor, "begin_step", begin_step)
    run(llm, {"rope": (small_words(30, seed=15), params(150))}, lambda: None)
    assert positions == [0, *range(30, 30 + 149)]


@pytest.mark.parametrize(
    "ratio, message",
    [
        (0, r"kv_retention_ratio=0: .*in \(0, 1\]"),
        (1.5, r"kv_retention_ratio=1.5: .*in \(0, 1\]"),
        ("half", r"kv_retention_ratio='half': .*in \(0, 1\]"),
        (True, r"kv_retention_ratio=True"),
        ("0.5", r"kv_retention_ratio='0.5': must be a number in \(0, 1\], not a string\."),
        (0.4, r"kv_retention_ratio=0.4: this server allows 0.5, 1.0\. Leave kv_retention_ratio out"),
    ],
)
def test_a_bad_ratio_is_refused_when_the_request_arrives(llm: Any, ratio: Any, message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message) as refusal:
        llm.generate([{"prompt_token_ids": small_words(10)}], params(5, kv_retention_ratio=ratio), use_tqdm=False)
    assert refusal.value.parameter == "kv_retention_ratio"
    assert_pool_whole(llm)


def test_sampling_with_a_seed_is_reproducible(llm: Any) -> None:
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=200, ignore_eos=True)
    first, second = (
        llm.generate([{"prompt_token_ids": small_words(25, seed=16)}], sampling, use_tqdm=False)[0].outputs[0].token_ids
        for _ in range(2)
    )
    assert list(first) == list(second)


def test_the_packed_cache_is_read_as_it_was_written(llm: Any) -> None:
    from kvllm.engine import cpu_cache

    for dtype in (torch.float32, torch.bfloat16):
        cache = torch.zeros(6, 3, BLOCK_SIZE, 2 * 64, dtype=dtype)
        reader = cpu_cache.PackedReader(cache, "vec")
        keys, values = torch.randn(2, 2 * BLOCK_SIZE, 3, 64).to(dtype)
        slots = torch.from_numpy(np.concatenate([np.arange(BLOCK_SIZE) + b * BLOCK_SIZE for b in (4, 1)]))
        cpu_cache.write(cache, keys, values, slots, "vec")
        read_keys, read_values = reader.read([torch.zeros_like(cache), cache], torch.tensor([4, 1]))
        assert torch.equal(read_keys[1], keys) and torch.equal(read_values[1], values)
        assert not read_keys[0].any() and not read_values[0].any()
