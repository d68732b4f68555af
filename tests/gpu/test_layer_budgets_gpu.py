"""Groups of layers with retention ratios of their own, in the V2 runner under CUDA graphs. Needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers import Exaone4Config

from kvllm.engine.stats import engine_stats
from kvllm.layout import request_geometry
from kvllm.reference import load_model
from tests.gpu.test_engine_gpu import (  # noqa: F401
    BLOCK_SIZE,
    CONFIG,
    check,
    equals_the_reference,
    greedy,
    model_dir,
    prompt,
    reference_model,
    start,
)
from tests.models import save_random_model

pytestmark = pytest.mark.engine

TABLE = {"0-1": 0.75, "2-3": 0.3}


def test_equals_reference(model_dir: Path, reference_model: Any) -> None:  # noqa: F811
    config = replace(CONFIG, retention_ratio=TABLE)
    llm = start(model_dir, config, num_gpu_blocks_override=180)
    equals_the_reference(llm, reference_model, config)
    engine_stats(llm, reset_peak=True)
    greedy(llm, [prompt(48, 1)], 16 * 40)
    geometry, held = request_geometry(config, BLOCK_SIZE), engine_stats(llm)["peak_kv_blocks"]
    assert geometry is not None
    print("blocks held and planned:", held, geometry.peak_blocks(48, 48 + 16 * 40))
    assert held <= geometry.peak_blocks(48, 48 + 16 * 40) <= held + 4
    llm.llm_engine.engine_core.shutdown()


def test_beside_layers_with_shorter_attention(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    folder = save_random_model(tmp_path, Exaone4Config, sliding_window=128, layer_types=kinds)
    config = replace(CONFIG, retention_ratio={"1": 0.75, "3": 0.3})
    llm = start(folder, config, max_model_len=1024, max_num_batched_tokens=128, num_gpu_blocks_override=281)
    equals_the_reference(llm, load_model(folder, device="cuda"), config)
    llm.llm_engine.engine_core.shutdown()


def test_without_kernels_of_its_own(model_dir: Path, reference_model: Any) -> None:  # noqa: F811
    """A method that makes its own table, with a limit on the history."""
    config = replace(CONFIG, method="pyramidkv", method_options={"num_groups": 2, "beta": 4}, history_size=128)
    llm = start(model_dir, config)
    prompts = [prompt(n, n) for n in (5, 70)]
    for p, output in zip(prompts, greedy(llm, prompts, 500), strict=True):
        check(reference_model, p, output, config)
    llm.llm_engine.engine_core.shutdown()


def test_survivors_in_four_bits_are_refused(model_dir: Path) -> None:  # noqa: F811
    config = replace(CONFIG, retention_ratio={"0-1": 0.875, "2-3": 0.4375}, survivor_bits=4)
    with pytest.raises(ValueError, match="survivor_bits=4: on GPUs it cannot be combined with the layer budgets"):
        start(model_dir, config)
