"""Layers with a window beside layers of full attention, in the V2 runner under CUDA graphs. Needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers import Exaone4Config, Gemma3TextConfig

from kvllm.engine.stats import engine_stats
from kvllm.reference import load_model
from tests.gpu.test_engine_gpu import check, greedy, prompt, start
from tests.models import save_random_model

pytestmark = pytest.mark.engine

MIXED: dict[str, Any] = {"sliding_window": 128, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}


@pytest.mark.parametrize("config_class", [Gemma3TextConfig, Exaone4Config])
def test_equals_reference(config_class: type, tmp_path: Path) -> None:
    """Four windows and more of each request, chunked prefill, a prefix-cache hit, and preemption in a small pool."""
    folder = save_random_model(tmp_path, config_class, **MIXED)
    model = load_model(folder, device="cuda")
    llm = start(folder, max_model_len=1024, max_num_batched_tokens=128, num_gpu_blocks_override=181)
    prompts = [prompt(n, n) for n in (1, 16, 17, 300, 200, 100)]
    for p, output in zip(prompts, greedy(llm, prompts, 400), strict=True):
        check(model, p, output)
    stats = engine_stats(llm)
    print(stats)
    assert stats["num_windows_compressed"] >= 4 * len(prompts) and stats["num_preemptions"] > 0
    assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
    first, again = greedy(llm, prompts[3:4], 8), greedy(llm, prompts[3:4], 400)
    assert again[0][:8] == first[0]
    check(model, prompts[3], again[0])
    (full,) = greedy(llm, prompts[4:5], 300, ratio=1.0)
    check(model, prompts[4], full, None)
    llm.llm_engine.engine_core.shutdown()
