"""Mixtures of experts in the V2 runner under CUDA graphs equal the reference. Needs a GPU and vLLM's expert kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers import Glm4MoeConfig, GptOssConfig, Qwen3MoeConfig

from kvllm.engine.stats import engine_stats
from kvllm.reference import load_model
from tests.gpu.test_engine_gpu import check, greedy, prompt, start
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
    prompts = [prompt(n, n) for n in (1, 16, 17, 300, 200, 100)]
    ties = sum(check(model, p, o).near_ties for p, o in zip(prompts, greedy(llm, prompts, 400), strict=True))
    stats = engine_stats(llm)
    print("near ties:", ties, stats)
    assert stats["num_windows_compressed"] >= 4 * len(prompts) and stats["num_preemptions"] > 0
    assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
    (first,), (again,) = greedy(llm, prompts[3:4], 8), greedy(llm, prompts[3:4], 400)
    assert again[:8] == first
    check(model, prompts[3], again)
    (full,) = greedy(llm, prompts[4:5], 300, ratio=1.0)
    check(model, prompts[4], full, None)
    llm.llm_engine.engine_core.shutdown()
