"""Layers with a window beside layers of full attention, in the V2 runner under CUDA graphs. Needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers import Exaone4Config, Gemma3TextConfig

from kvllm.reference import load_model
from tests.gpu.test_engine_gpu import equals_the_reference, start
from tests.models import save_random_model

pytestmark = pytest.mark.engine

MIXED: dict[str, Any] = {"sliding_window": 128, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}


@pytest.mark.parametrize("config_class", [Gemma3TextConfig, Exaone4Config])
def test_equals_reference(config_class: type, tmp_path: Path) -> None:
    """Four windows and more of each request, chunked prefill, a prefix-cache hit, and preemption in a small pool."""
    folder = save_random_model(tmp_path, config_class, **MIXED)
    model = load_model(folder, device="cuda")
    llm = start(folder, max_model_len=1024, max_num_batched_tokens=128, num_gpu_blocks_override=181)
    equals_the_reference(llm, model)
    llm.llm_engine.engine_core.shutdown()
