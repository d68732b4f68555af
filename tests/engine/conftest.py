"""One vLLM engine at a time, in this process, so that a test can look inside scheduler and worker."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

# Before vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads of two engines would starve each other

from kvllm.config import KvConfig
from kvllm.reference import load_model
from tests.conftest import DEFAULT_MODEL, group_resources
from tests.models import VOCAB_SIZE, save_random_llama
from tests.near_ties import check_greedy

BLOCK_SIZE = 32
CONFIG = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5, request_ratios="1.0")
# The options of an engine that several modules use: 96 tokens a step, so that prompts are prefilled in chunks.
SHARED: dict[str, Any] = {"max_num_batched_tokens": 96, "max_num_seqs": 16}


@contextmanager
def engine(model_dir: Path, config: KvConfig | None = CONFIG, **options: Any) -> Iterator[Any]:
    """A float32 engine, all of it in this process; stock vLLM with config=None."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "skip_tokenizer_init": not Path(model_dir, "tokenizer_config.json").exists(),
        "dtype": "float32",
        "max_model_len": 1024,
        "block_size": BLOCK_SIZE,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "seed": 0,
    }
    if config is not None:
        settings["additional_config"] = {"kvllm": config.to_dict()}
    llm = LLM(str(model_dir), **(settings | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


class Served:
    """An engine of a tiny random checkpoint, asked for `num_tokens` at a time, and the model for the reference."""

    def __init__(self, llm: Any, folder: Path, num_tokens: int, block_size: int = BLOCK_SIZE) -> None:
        self.llm, self.reference, self.num_tokens, self.block_size = llm, load_model(folder), num_tokens, block_size

    def greedy(self, *prompt_ids: list[int], num_tokens: int | None = None, **extra: Any) -> list[Any]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=num_tokens or self.num_tokens, ignore_eos=True, detokenize=False,
            extra_args=extra or None,
        )  # fmt: skip
        return self.llm.generate([{"prompt_token_ids": p} for p in prompt_ids], params, use_tqdm=False)

    def check(self, prompt: list[int], output: Any, config: KvConfig | None = CONFIG) -> None:
        check_greedy(self.reference, prompt, list(output.outputs[0].token_ids), config, self.block_size, num_variants=0)


@pytest.fixture(scope="module")
def shared_llm(model_dir: Path) -> Any:
    """The engine of CONFIG and SHARED, its prefix cache empty: for modules of the xdist_group "shared engine"."""
    llm = group_resources.get("engine", lambda: engine(model_dir, **SHARED))
    llm.reset_prefix_cache()
    return llm


@pytest.fixture(scope="session")
def reference_model(model_dir: Path) -> Any:
    return load_model(model_dir)


@pytest.fixture(scope="session")
def small_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four layers, without a tokenizer, for what schedulers and workers do: ten times as fast."""
    return save_random_llama(tmp_path_factory.mktemp("small-model"), num_heads=4)


@pytest.fixture(scope="session")
def small_reference(small_model_dir: Path) -> Any:
    return load_model(small_model_dir)


def small_words(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt for the small model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


@cache
def _text() -> list[int]:
    folder = Path(os.environ.get("KVLLM_TEST_MODEL", DEFAULT_MODEL))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(Path(__file__).parents[2].joinpath("LICENSE").read_text())["input_ids"]


def words(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt: a stretch of this project's licence, from an offset that `seed` chooses."""
    start = seed * 37 % (len(_text()) - num_tokens)
    return _text()[start : start + num_tokens]


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def compressors_of(llm: Any) -> list[Any]:
    """That of each group of layers that has a ratio of its own; without layer budgets there is one."""
    compressor = compressor_of(llm)
    return getattr(compressor, "parts", [compressor])


def compressor_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.kv_compressor


def attention_tables(
    compressor: Any, block_tables: Tensor, computed: list[int], counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Block tables and lengths as `CompressorV1` gives them to the attention of the step that it has just begun.

    block_tables: [num_reqs, any], logical; computed, counts: tokens of each request before the step, and of the step
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    seq_lens = torch.tensor(computed, dtype=torch.int32) + torch.tensor(counts, dtype=torch.int32)
    nothing = torch.empty(0)
    metadata = compressor._shorten(
        CommonAttentionMetadata(
            query_start_loc=nothing, query_start_loc_cpu=nothing, seq_lens=seq_lens, num_reqs=len(counts),
            num_actual_tokens=sum(counts), max_query_len=max(counts), max_seq_len=int(seq_lens.max()),
            block_table_tensor=block_tables, slot_mapping=nothing,
        )
    )  # fmt: skip
    return metadata.block_table_tensor, metadata.seq_lens


def watch_blocks(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Make every later step check invariant 3: attention reads exactly the scheduler's live blocks.

    returns a list that gets an entry for each request of each step, and each group of layers that has a ratio of its
    own: its id, and the events that it has behind it
    """
    scheduler = scheduler_of(llm)
    seen: list[tuple[str, int]] = []

    def begin_step(number: int, compressor: Any, original: Any, scheduled: dict[str, int]) -> None:
        manager = next(m for m in scheduler.kv_managers if m.part == number)
        original(scheduled)
        batch = compressor.runner.input_batch
        counts = [scheduled[req_id] for req_id in batch.req_ids]
        computed = batch.num_computed_tokens_cpu[: len(counts)].tolist()
        logical = torch.from_numpy(batch.block_table[compressor.group].get_numpy_array()[: len(counts)].copy())
        tables, lengths = attention_tables(compressor, logical, computed, counts)
        for i, req_id in enumerate(batch.req_ids):
            if (compressed := scheduler._compressed(req_id)) is None:  # a request with ratio 1.0
                continue
            whole, request = compressed
            geometry, prompt = whole.groups[number], request.num_prompt_tokens
            length = geometry.physical_len(prompt, computed[i]) + counts[i]
            assert int(lengths[i]) == length
            read = tables[i, : -(-length // manager.block_size)].tolist()
            live = [b.block_id for b in manager.req_to_blocks[req_id] if not b.is_null]
            assert sorted(read) == sorted(live)
            seen.append((req_id, geometry.num_events(prompt, computed[i])))

    for number, compressor in enumerate(compressors_of(llm)):
        checked = partial(begin_step, number, compressor, compressor.begin_step)
        monkeypatch.setattr(compressor, "begin_step", checked)
    return seen


def assert_pool_whole(llm: Any) -> None:
    """Every block but the null block is free again."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
