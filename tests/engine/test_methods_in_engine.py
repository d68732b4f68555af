"""Other methods, merging ones included, and bounded memory: the engine equals the reference with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
from tests.engine.conftest import BLOCK_SIZE, assert_pool_whole, engine, small_words
from tests.near_ties import check_greedy

pytestmark = pytest.mark.engine

WINDOW: dict[str, Any] = {"window_size": 64, "buffer_size": 32, "retention_ratio": 0.5}
# Two windows are kept as they were; the third is compressed together with what is left of them.
HISTORY: dict[str, Any] = {**WINDOW, "history_size": 64}
ROUNDED: dict[str, Any] = {**WINDOW, "survivor_bits": 4}
BUDGET: dict[str, Any] = {**WINDOW, "policy": "budget", "budget_size": 64, "budget_interval": 32}


@pytest.mark.parametrize(
    "config, num_events",
    [
        (KvConfig(method="cask", **HISTORY), 3),
        (KvConfig(method="kara", **ROUNDED), 3),
        (KvConfig(method="kara", **BUDGET), 4),
        (KvConfig(method="random", **BUDGET), 4),  # draws by text position, which survivors keep through every cut
    ],
    ids=lambda v: f"{v.method}-{v.policy}-{v.survivor_bits}" if isinstance(v, KvConfig) else str(v),
)
def test_equals_reference(config: KvConfig, num_events: int, small_model_dir: Path, small_reference: Any) -> None:
    prompts = [small_words(20, seed=21), small_words(32, seed=22)]
    params = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
    with engine(small_model_dir, config) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            check_greedy(small_reference, prompt, list(output.outputs[0].token_ids), config, BLOCK_SIZE, num_variants=0)
        assert engine_stats(llm)["num_windows_compressed"] == num_events * len(prompts)
        assert_pool_whole(llm)
