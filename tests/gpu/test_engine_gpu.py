"""The V2 runner under CUDA graphs equals the reference. Needs a GPU; the model is made here, with random weights."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TRITON_F32_DEFAULT"] = "ieee"  # before Triton is imported: the attention kernel would multiply in tf32

from vllm import LLM, SamplingParams

from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
from kvllm.reference import load_model
from tests.models import VOCAB_SIZE, save_random_llama
from tests.near_ties import Match, check_greedy
from tests.random_traffic import run_traffic

pytestmark = pytest.mark.engine

BLOCK_SIZE = 16
CONFIG = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5, request_ratios="1.0")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model"), num_heads=8)


@pytest.fixture(scope="module")
def reference_model(model_dir: Path) -> Any:
    return load_model(model_dir, device="cuda")


def settings(config: KvConfig = CONFIG) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "attention_backend": "TRITON_ATTN",
        "max_model_len": 2048,
        "block_size": BLOCK_SIZE,
        "skip_tokenizer_init": True,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 256,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 2**31,  # vLLM's profiling fails where another process frees memory meanwhile
        "disable_log_stats": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
        "additional_config": {"kvllm": config.to_dict()},
    }


def start(model_dir: Path, config: KvConfig = CONFIG, **options: Any) -> LLM:
    return LLM(str(model_dir), **(settings(config) | options))


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    made = start(model_dir, num_gpu_blocks_override=150)
    yield made
    made.llm_engine.engine_core.shutdown()


def prompt(num_tokens: int, seed: int) -> list[int]:
    return [random.Random(1000 * seed + i).randrange(10, VOCAB_SIZE) for i in range(num_tokens)]


def greedy(llm: LLM, prompts: list[list[int]], num_tokens: int, ratio: float | None = None) -> list[list[int]]:
    params = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False,
        extra_args={"kv_retention_ratio": ratio} if ratio else None,
    )  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def check(model: Any, prompt_ids: list[int], output: list[int], config: KvConfig | None = CONFIG) -> Match:
    match = check_greedy(model, prompt_ids, output, config, BLOCK_SIZE)
    if match.variant is not None:
        print(f"prompt of {len(prompt_ids)}: a near tie among the survivors, as variant {match.variant} of the scores")
    return match


def equals_the_reference(llm: LLM, model: Any, config: KvConfig = CONFIG) -> None:
    """Chunked prefill, four windows and more of each request, preemption in a small pool, and a prefix-cache hit."""
    prompts = [prompt(n, n) for n in (1, 16, 17, 300, 200, 100)]
    outputs = greedy(llm, prompts, 400)
    ties = sum(check(model, p, o, config).near_ties for p, o in zip(prompts, outputs, strict=True))
    stats = engine_stats(llm)
    print("near ties:", ties, stats)
    assert stats["num_windows_compressed"] >= 4 * len(prompts) and stats["num_preemptions"] > 0
    assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
    (first,), (again,) = greedy(llm, prompts[3:4], 8), greedy(llm, prompts[3:4], 400)
    assert again[:8] == first
    check(model, prompts[3], again, config)
    (full,) = greedy(llm, prompts[4:5], 300, ratio=1.0)
    check(model, prompts[4], full, None)


def test_equals_reference(llm: LLM, reference_model: Any) -> None:
    prompts = [prompt(n, n) for n in (1, 15, 16, 17, 300)]
    outputs = greedy(llm, prompts, 400)
    ties = sum(check(reference_model, p, o).near_ties for p, o in zip(prompts, outputs, strict=True))
    print("near ties:", ties, engine_stats(llm))
    assert engine_stats(llm)["num_windows_compressed"] >= 5 * len(prompts)
    assert 0 < engine_stats(llm)["compression_seconds"] < 60
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_full_ratio_is_stock(llm: LLM, reference_model: Any) -> None:
    prompts = [prompt(40, 5)]
    (output,) = greedy(llm, prompts, 300, ratio=1.0)
    check(reference_model, prompts[0], output, None)


def test_random_traffic_with_preemption(llm: LLM, reference_model: Any) -> None:
    """200 requests of random lengths, aborts among them, in a pool too small for those that run."""
    rng = random.Random(0)
    before = engine_stats(llm)
    texts = {str(i): prompt(rng.randrange(1, 200), i) for i in range(200)}
    lengths = {i: rng.randrange(10, 500) for i in texts}
    outputs, aborted = run_traffic(
        llm.llm_engine, texts, lengths, rng, lambda *_: rng.randrange(0, 3), abort_chance=0.01, detokenize=False
    )
    after = engine_stats(llm)
    print("preemptions:", after["num_preemptions"] - before["num_preemptions"], "aborted:", len(aborted))
    assert after["num_preemptions"] > before["num_preemptions"] and aborted
    assert after["free_kv_blocks"] == after["num_kv_blocks"]
    finished = sorted(set(outputs) - aborted)
    assert len(finished) + len(aborted) >= 200
    matches = []
    for i in finished[::4]:
        assert len(outputs[i]) == lengths[i]
        matches.append(check(reference_model, texts[i], outputs[i]))
    near = sum(match.variant is not None for match in matches)
    print("near ties among survivors:", near, "of", len(matches), "requests")
    assert near <= len(matches) // 10


def test_graphs_do_not_change_what_is_kept(llm: LLM, model_dir: Path) -> None:
    prompts = [prompt(n, n) for n in (33, 64)]
    with_graphs = greedy(llm, prompts, 300)
    eager = start(model_dir, enforce_eager=True)
    assert greedy(eager, prompts, 300) == with_graphs
    eager.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("method", ["snapkv", "random"])
def test_generic_methods(method: str, model_dir: Path, reference_model: Any) -> None:
    config = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5, method=method)
    llm = start(model_dir, config, enforce_eager=True)
    prompts = [prompt(n, n) for n in (5, 70)]
    for p, output in zip(prompts, greedy(llm, prompts, 300), strict=True):
        check(reference_model, p, output, config)
    llm.llm_engine.engine_core.shutdown()


def test_methods_mix_in_a_batch(model_dir: Path, reference_model: Any) -> None:
    """Under CUDA graphs: requests that have kernels of their own beside others, with histories."""
    config = replace(CONFIG, history_size=128, request_methods={"random": {}, "snapkv": {"kernel_size": 3}, "cask": {}})
    llm = start(model_dir, config)
    asked = [(prompt(n, n), name) for n in (5, 64) for name in config.methods]
    params = [
        SamplingParams(
            temperature=0, max_tokens=500, ignore_eos=True, detokenize=False, extra_args={"kv_method": name}
        )
        for _, name in asked
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], params, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    assert len({tuple(answer) for answer in answers}) == len(asked)
    for (ids, name), answer in zip(asked, answers, strict=True):
        check(reference_model, ids, answer, config.of_method(name))
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("method", ["kara", "random"])
def test_history_is_compressed_again(method: str, model_dir: Path, reference_model: Any) -> None:
    """Under CUDA graphs: after four windows every other event takes the history too; other ratios, other cycles."""
    config = replace(CONFIG, method=method, history_size=128, request_ratios="0.25,0.75")
    llm = start(model_dir, config)
    prompts = [prompt(n, n) for n in (5, 64, 300)]
    for p, output in zip(prompts, greedy(llm, prompts, 700), strict=True):
        check(reference_model, p, output, config)
    stats = engine_stats(llm)
    assert stats["num_windows_compressed"] == 10 * len(prompts)
    # Prompts of 1, 4 and 19 blocks, history, window and buffer behind each, and a block for the step that is ahead.
    assert stats["peak_kv_blocks"] <= 1 + 4 + 19 + 3 * ((128 + 64 + 32) // BLOCK_SIZE + 1)
    assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
    for ratio in (0.25, 0.75):
        (output,) = greedy(llm, prompts[:1], 700, ratio)
        check(reference_model, prompts[0], output, replace(config, retention_ratio=ratio))
    llm.llm_engine.engine_core.shutdown()
