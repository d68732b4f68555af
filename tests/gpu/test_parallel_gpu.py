"""Two GPUs: tensor, pipeline, data and expert parallelism are vLLM's own, and give the reference's tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("fewer than two GPUs", allow_module_level=True)

from transformers import Qwen3MoeConfig

from kvllm.reference import load_model
from tests.gpu.test_engine_gpu import check, greedy, model_dir, prompt, reference_model, settings, start  # noqa: F401
from tests.models import EXPERTS, save_random_model

pytestmark = pytest.mark.engine

PROMPTS = [prompt(n, n) for n in (5, 33, 150, 300)]
NUM_TOKENS = 400


# Graphs with tensor parallelism and experts; the others run eagerly, since capturing takes half of an engine's start.
@pytest.mark.parametrize("split, eager", [("tensor_parallel_size", False), ("pipeline_parallel_size", True)])
def test_model_over_two_devices(split: str, eager: bool, model_dir: Path, reference_model: Any) -> None:  # noqa: F811
    options: dict[str, Any] = {split: 2, "distributed_executor_backend": "mp", "enforce_eager": eager}
    llm = start(model_dir, **options)
    for p, output in zip(PROMPTS, greedy(llm, PROMPTS, NUM_TOKENS), strict=True):
        check(reference_model, p, output)
    llm.llm_engine.engine_core.shutdown()


def test_experts_over_two_devices(tmp_path: Path) -> None:
    """Each GPU has half of the heads and half of the experts."""
    folder = save_random_model(tmp_path, Qwen3MoeConfig, **EXPERTS)
    model = load_model(folder, device="cuda")
    model.set_experts_implementation("eager")  # the grouped kernels of PyTorch are for bfloat16
    llm = start(
        folder, tensor_parallel_size=2, enable_expert_parallel=True, distributed_executor_backend="mp",
        max_model_len=1024,
    )  # fmt: skip
    for p, output in zip(PROMPTS, greedy(llm, PROMPTS, NUM_TOKENS), strict=True):
        check(model, p, output)
    llm.llm_engine.engine_core.shutdown()


def test_two_engines_behind_one_client(model_dir: Path, reference_model: Any) -> None:  # noqa: F811
    for p, output in zip(PROMPTS, asyncio.run(serve_data_parallel(model_dir)), strict=True):
        check(reference_model, p, output)


async def serve_data_parallel(model_dir: Path) -> list[list[int]]:  # noqa: F811
    """The answers, every other from the second engine."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(str(model_dir), data_parallel_size=2, enforce_eager=True, **settings())
    )
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)

    async def answer(i: int) -> list[int]:
        made: list[int] = []
        stream = llm.generate({"prompt_token_ids": PROMPTS[i]}, params, f"request-{i}", data_parallel_rank=i % 2)
        async for output in stream:
            made = list(output.outputs[0].token_ids)
        return made

    try:
        return list(await asyncio.gather(*map(answer, range(len(PROMPTS)))))
    finally:
        llm.shutdown()
