"""Several devices: tensor parallelism is vLLM's own, since the layout follows from two numbers alone.

Pipeline parallelism is not tested here: stock vLLM's CPU runner fails with it in eager mode, by an assertion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from kvllm.reference import load_model
from tests.engine.conftest import BLOCK_SIZE, CONFIG, assert_pool_whole, engine
from tests.models import VOCAB_SIZE, save_random_llama
from tests.near_ties import check_greedy

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def made_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: SmolLM2's nine heads do not split in two."""
    return save_random_llama(tmp_path_factory.mktemp("model"), num_heads=4)


def test_tensor_parallel_ranks_give_the_reference_tokens(made_model: Path) -> None:
    reference: Any = load_model(made_model)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (5, 33, 150)]
    params = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True, detokenize=False)
    with engine(
        made_model,
        distributed_executor_backend="mp",
        skip_tokenizer_init=True,
        max_num_batched_tokens=96,
        tensor_parallel_size=2,
    ) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            check_greedy(reference, prompt, list(output.outputs[0].token_ids), CONFIG, BLOCK_SIZE, num_variants=0)
        assert_pool_whole(llm)
