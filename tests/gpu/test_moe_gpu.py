"""Mixtures of experts in the V2 runner under CUDA graphs equal the reference. Needs a GPU and vLLM's expert kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers import Glm4MoeConfig, GptOssConfig, Qwen3MoeConfig

from kvllm.reference import load_model
from tests.gpu.test_engine_gpu import equals_the_reference, start
from tests.models import EXPERTS, GLM_EXPERTS, GPT_OSS_EXPERTS, save_random_model

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "config_class, options",
    [(Qwen3MoeConfig, EXPERTS), (Glm4MoeConfig, GLM_EXPERTS), (GptOssConfig, GPT_OSS_EXPERTS)],
    ids=["qwen3", "glm-4.5", "gpt-oss"],
)
def test_equals_reference(config_class: type, options: dict[str, Any], tmp_path: Path) -> None:
    """Four windows and more of each request, chunked prefill, a prefix-cache hit, and preemption in a small pool."""
    folder = save_random_model(tmp_path, config_class, **options)
    model = load_model(folder, device="cuda")
    model.set_experts_implementation("eager")  # the grouped kernels of PyTorch are for bfloat16
    blocks = 150 if config_class is GptOssConfig else 120  # gpt-oss has a second group, of a window's blocks
    llm = start(folder, max_model_len=1024, max_num_batched_tokens=128, num_gpu_blocks_override=blocks)
    equals_the_reference(llm, model)
    llm.llm_engine.engine_core.shutdown()
