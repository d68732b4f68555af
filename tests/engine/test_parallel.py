"""Several devices: vLLM's tensor parallelism works unchanged, since the layout depends on two numbers alone.

Pipeline parallelism is not tested here: stock vLLM's CPU runner fails with it in eager mode, by an assertion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.conftest import BLOCK_SIZE, CONFIG, assert_pool_whole, engine, small_words
from tests.near_ties import check_greedy

pytestmark = pytest.mark.engine


def test_tensor_parallel_ranks_give_the_reference_tokens(small_model_dir: Path, small_reference: Any) -> None:
    """With the small model: SmolLM2's nine heads do not split in two."""
    prompts = [small_words(n, seed=n) for n in (5, 33, 150)]
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    with engine(
        small_model_dir,
        distributed_executor_backend="mp",
        max_num_batched_tokens=96,
        tensor_parallel_size=2,
    ) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            check_greedy(small_reference, prompt, list(output.outputs[0].token_ids), CONFIG, BLOCK_SIZE, num_variants=0)
        assert_pool_whole(llm)
