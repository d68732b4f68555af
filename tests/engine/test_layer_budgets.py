"""Groups of layers with retention ratios of their own: each a KV cache group of vLLM's, all from one pool."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from kvllm.cli.plan import local_blocks as planned_local_blocks
from kvllm.cli.plan import plan
from kvllm.compression.footprint import footprint
from kvllm.config import KvConfig
from kvllm.engine.spec import KvSpec
from kvllm.engine.stats import engine_stats
from kvllm.layout import request_geometry
from tests.conftest import group_resources
from tests.engine.conftest import (
    BLOCK_SIZE,
    Served,
    assert_pool_whole,
    compressors_of,
    engine,
    scheduler_of,
    watch_blocks,
)
from tests.engine.families import VOCAB_SIZE, Family, save_random

MAX_MODEL_LEN = 512
NUM_TOKENS = 424  # four windows and some
# Of windows of three blocks the groups keep 2.25 and 1.02 on average: not always as many, and at other events.
LAYERS = {"Llama": ("0-1", "2-3"), "EXAONE 4": ("1", "3")}
MODELS = {
    "Llama": Family("Llama", "llama", {"head_dim": 32, "num_hidden_layers": 4}),
    "EXAONE 4": Family(
        "EXAONE 4",
        "exaone4",
        {
            "head_dim": 32,
            "sliding_window": 128,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
NUM_BLOCKS = {"Llama": 40, "EXAONE 4": 56}

pytestmark = pytest.mark.engine
each = pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in MODELS])


def config_of(name: str, **options: Any) -> KvConfig:
    table = dict(zip(LAYERS[name], (0.75, 0.34), strict=True))
    return KvConfig(window_size=96, buffer_size=32, retention_ratio=table, **options)


def words(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


@pytest.fixture
def served(name: str, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.getbasetemp() / f"budgets-{name}"

    def start() -> Any:
        save_random(MODELS[name], folder)
        return engine(
            folder, config_of(name, request_ratios="1.0", request_methods="random"), max_model_len=MAX_MODEL_LEN,
            skip_tokenizer_init=True, max_num_seqs=8, max_num_batched_tokens=64,
            num_gpu_blocks_override=NUM_BLOCKS[name] + 1,
        )  # fmt: skip

    llm = group_resources.get(f"budgets, {name}", start)
    llm.reset_prefix_cache()
    return group_resources.get(f"budgets, {name}, served", lambda: nullcontext(Served(llm, folder, NUM_TOKENS)))


@each
def test_requests_equal_the_reference_through_chunks_preemption_and_cache_hits(
    name: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = engine_stats(served.llm), watch_blocks(served.llm, monkeypatch)
    prompts = [words(n, n) for n in (28, 60, 64)]  # a few tokens before a block ends, or at its end
    outputs = served.greedy(*prompts)
    after = engine_stats(served.llm)
    assert after["num_preemptions"] > before["num_preemptions"]
    assert {max(count for i, count in seen if i == req_id) for req_id, _ in seen} == {4}
    for prompt, output in zip(prompts, outputs, strict=True):
        served.check(prompt, output, config_of(name))
    (again,) = served.greedy(prompts[2])
    assert again.num_cached_tokens == 32
    served.check(prompts[2], again, config_of(name))
    (full,) = served.greedy(prompts[1], num_tokens=150, kv_retention_ratio=1.0)
    served.check(prompts[1], full, None)
    assert_pool_whole(served.llm)


@each
def test_the_plan_counts_the_blocks_of_the_engine(name: str, served: Served) -> None:
    """Groups, bytes and queries by the config alone, and what one request holds at its peak."""
    scheduler, config = scheduler_of(served.llm), config_of(name)
    planned = footprint(MODELS[name].config(), config, 8, max_model_len=MAX_MODEL_LEN)
    cache = scheduler.kv_cache_config
    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    assert planned.groups == scheduler.groups and planned.groups.num_full == 2
    assert [spec.part for spec in specs if isinstance(spec, KvSpec)] == [0, 1]
    assert planned.groups.num_local == sum(not isinstance(spec, KvSpec) for spec in specs)
    assert {t.size for t in cache.kv_cache_tensors} == {planned.kv_per_token * BLOCK_SIZE * cache.num_blocks}
    banks = [compressor.state.bank.num_bytes for compressor in compressors_of(served.llm)]
    assert planned.query_bank == sum(banks) and banks[0] == banks[1]

    length = 32 + NUM_TOKENS
    engine_stats(served.llm, reset_peak=True)
    served.greedy(words(32), num_tokens=NUM_TOKENS)
    held = engine_stats(served.llm)["peak_kv_blocks"]
    geometry = request_geometry(config, BLOCK_SIZE)
    (row,) = plan(planned, 2**24, geometry, BLOCK_SIZE, 32, [length]).rows
    local = planned_local_blocks(planned.groups, BLOCK_SIZE, 32, length)  # with the steps in flight of a GPU
    assert geometry is not None and row.kvllm_blocks - local == geometry.peak_blocks(32, length)
    assert geometry.peak_blocks(32, length) - 1 <= held - local_blocks(name, length) <= geometry.peak_blocks(32, length)
    assert row.stock_blocks - local == 2 * -(-length // BLOCK_SIZE) > row.kvllm_blocks - local


def local_blocks(name: str, length: int) -> int:
    """Blocks of both local groups that a decoding request holds: its window of 128, at a block's edge or not."""
    return 0 if name == "Llama" else 2 * (128 // BLOCK_SIZE + (length % BLOCK_SIZE > 0))


def test_what_requests_may_not_choose() -> None:
    with pytest.raises(
        ValueError, match=r"request_ratios='0.5': .* applies to all layers, so 0.5 contradicts retention_"
    ):
        config_of("Llama", request_ratios="0.5")


@pytest.mark.parametrize("name", ["Llama"])
def test_a_request_with_a_ratio_of_its_own_is_refused(name: str, served: Served) -> None:
    with pytest.raises(VLLMValidationError, match=r"kv_retention_ratio=0.5: this server allows 0.545, 1.0"):
        served.greedy(words(5), num_tokens=5, kv_retention_ratio=0.5)
    (own,) = served.greedy(words(40, 40), num_tokens=160, kv_retention_ratio=0.545)
    served.check(words(40, 40), own, config_of(name))


@pytest.mark.parametrize("name", ["Llama"])
def test_a_request_may_choose_its_method(name: str, served: Served) -> None:
    (output,) = served.greedy(words(40, 40), num_tokens=160, kv_method="random")
    served.check(words(40, 40), output, config_of(name, method="random"))


def test_a_table_that_does_not_name_the_model_s_layers_is_refused(tmp_path: Path) -> None:
    save_random(MODELS["Llama"], tmp_path)
    table = {"0-2": 0.5, "3-5": 0.4}
    with (
        pytest.raises(ValueError, match="layers 4-5 are not among the model's full-attention layers, which are 0-3"),
        engine(tmp_path, replace(config_of("Llama"), retention_ratio=table), max_model_len=MAX_MODEL_LEN),
    ):
        pass
