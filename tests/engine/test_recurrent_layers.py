"""Mamba layers beside layers of full attention, whose blocks the allocator has larger than the kernels.

With prefix caching stock vLLM's CPU kernel of Mamba fails; what differs with it is tested on GPUs.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GraniteMoeHybridConfig
from vllm import SamplingParams

from kvllm.compression.blocks import blocks_held
from kvllm.engine.admission import most_ahead
from kvllm.engine.attention import in_kernel_blocks
from kvllm.engine.patches import with_zeroed_kernel_blocks
from kvllm.engine.scheduler import chunk_of_states
from kvllm.engine.stats import engine_stats
from kvllm.reference import load_model
from tests.engine.conftest import BLOCK_SIZE, CONFIG, assert_pool_whole, engine, scheduler_of, small_words
from tests.models import GRANITE_HYBRID, save_random_model
from tests.near_ties import check_greedy


@pytest.mark.engine
def test_answers_are_the_references(tmp_path: Path) -> None:
    """Three windows and more of each request, chunked prefill, and preemption with resume in a small pool."""
    folder = save_random_model(tmp_path, GraniteMoeHybridConfig, **GRANITE_HYBRID | {"mamba_d_state": 32})
    model = load_model(folder)
    prompts = [small_words(n, seed=n) for n in (5, 33, 150)]
    params = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True, detokenize=False)
    options: dict[str, Any] = {"max_num_batched_tokens": 96, "max_num_seqs": 4, "enable_prefix_caching": False}
    with engine(folder, max_model_len=512, num_gpu_blocks_override=20, **options) as llm:
        scheduler = scheduler_of(llm)
        assert scheduler.kv_block_size > BLOCK_SIZE
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        stats = engine_stats(llm)
        print(scheduler.kv_block_size, stats)
        assert stats["num_windows_compressed"] >= 3 * len(prompts) and stats["num_preemptions"] > 0
        assert_pool_whole(llm)
    for prompt, output in zip(prompts, outputs, strict=True):
        check_greedy(model, prompt, list(output.outputs[0].token_ids), CONFIG, BLOCK_SIZE)


@pytest.mark.parametrize("block_size", [16, 272])
def test_chunks_end_where_states_may_be_kept(block_size: int) -> None:
    """No chunk passes a boundary and ends behind it, and every chunk moves on."""
    rng = random.Random(0)
    for _ in range(1000):
        start, most = rng.randrange(4 * block_size), rng.randrange(1, 4 * block_size)
        end = start + chunk_of_states(start, most, block_size)
        assert start < end <= start + most
        assert end % block_size == 0 or end // block_size == start // block_size


def test_a_table_in_kernel_blocks() -> None:
    table = torch.tensor([[3, 0], [7, 2]], dtype=torch.int32)
    expected = [[9, 10, 11, 0, 1, 2], [21, 22, 23, 6, 7, 8]]
    assert in_kernel_blocks(table, 3).tolist() == expected
    out = torch.full((4, 6), -1, dtype=torch.int32)
    made = in_kernel_blocks(table, 3, out)
    assert made.tolist() == expected and made.data_ptr() == out.data_ptr() and (out[2:] == -1).all()
    assert in_kernel_blocks(table, 1) is table


def test_new_blocks_are_zeroed_in_the_kernels_blocks() -> None:
    zeroed: list[int] = []
    zero = with_zeroed_kernel_blocks(lambda self, block_ids: zeroed.extend(block_ids))
    zero(SimpleNamespace(kv_compressor=SimpleNamespace(blocks_per_block=2)), [1, 4])
    zero(SimpleNamespace(kv_compressor=None), [5])
    assert zeroed == [2, 3, 8, 9, 5]


def test_admission_looks_ahead_as_far_as_a_block() -> None:
    """One request gains two blocks and gives one back, the other ends."""
    gained = np.array([0] * 4 + [1] * 8 + [2] * 3 + [1] * 2)

    def held(steps: Any) -> Any:
        return np.stack([2 + gained[steps[:, 0]], np.full(len(steps), 5)], axis=1)

    assert most_ahead(held, np.array([100, 100]), 16) == 2
    assert most_ahead(held, np.array([100, 3]), 16) == 0  # before the other ends, nothing is gained


def test_blocks_held_broadcasts(small_model_dir: Path) -> None:
    from kvllm.layout import Geometry

    geometry = Geometry.from_config(CONFIG, BLOCK_SIZE)
    assert geometry is not None
    prompt, computed = np.array([5, 300]), np.arange(0, 512, 64)[:, None] + 300
    together = blocks_held(geometry, prompt, computed, 128)
    assert together.shape == (8, 2)
    assert together[3, 1] == blocks_held(geometry, prompt[1:], computed[3], 128)[0]
