"""Gated delta nets beside layers of full attention (Qwen3-Next), in the V2 runner under CUDA graphs. Needs a GPU.

Their kernels take no float32, so outputs are the reference's as far as bfloat16 allows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers import Qwen3NextConfig
from vllm import LLM

from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
from kvllm.reference import generate, load_model
from tests.gpu.test_engine_gpu import CONFIG, greedy, prompt, settings
from tests.gpu.test_linear_layers_gpu import NUM_BLOCKS, check_pool, exact_convolutions, scheduler_of, traffic  # noqa: F401
from tests.models import QWEN3_NEXT, save_random_model
from tests.near_ties import greedy_losses

pytestmark = pytest.mark.engine

# The method scores by position alone, so that bfloat16 moves no choice.
HALF_CONFIG = replace(CONFIG, method="streaming_llm")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Any]]:
    folder = save_random_model(tmp_path_factory.mktemp("qwen"), Qwen3NextConfig, **QWEN3_NEXT)
    model = load_model(folder)
    # So that what attention finds weighs more than what bfloat16 rounds away.
    for name, weight in model.named_parameters():
        if name.endswith("self_attn.o_proj.weight"):
            weight.data *= 4
    model.save_pretrained(folder)
    model = model.to("cuda")
    model.set_experts_implementation("eager")
    options = settings(HALF_CONFIG)
    options["additional_config"]["gdn_prefill_backend"] = "triton"  # the other would compile FlashInfer's
    options |= {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN"}
    llm = LLM(str(folder), **options | {"max_model_len": 1024, "num_gpu_blocks_override": NUM_BLOCKS})
    yield llm, model
    llm.llm_engine.engine_core.shutdown()


def losses(model: Any, prompts: list[list[int]], outputs: list[list[int]], config: KvConfig | None) -> Tensor:
    """How far each token is from the reference's best, in nats."""
    return torch.cat([greedy_losses(model, p, o, config, 16) for p, o in zip(prompts, outputs, strict=True)]).cpu()


def summary(loss: Tensor) -> str:
    return f"mean {loss.mean():.5f}, most {loss.max():.3f}, not the best {float((loss > 0).float().mean()):.3f}"


def test_gated_delta_nets_give_the_references_outputs(qwen: tuple[LLM, Any]) -> None:
    llm, model = qwen
    assert scheduler_of(llm).block_size > 16
    prompts = [prompt(n, n) for n in (1, 16, 17, 100, 300, 600)]
    outputs = greedy(llm, prompts, 400)
    assert engine_stats(llm)["num_windows_compressed"] >= 4 * len(prompts)
    ours = losses(model, prompts, outputs, HALF_CONFIG)
    in_half = copy.deepcopy(model).bfloat16()
    answers = [generate(in_half, p, 400, HALF_CONFIG, ignore_eos=True).token_ids for p in prompts]
    own = losses(model, prompts, answers, HALF_CONFIG)
    other = losses(model, prompts, outputs, replace(HALF_CONFIG, retention_ratio=0.25))
    print("engine:", summary(ours), "| reference in bfloat16:", summary(own), "| other survivors:", summary(other))
    assert ours.mean() < 1.5 * own.mean() + 1e-3
    # The figures can tell: they are larger against a reference that keeps other tokens.
    assert other.mean() > 3 * ours.mean()
    check_pool(llm)


def test_gated_delta_nets_in_random_traffic(qwen: tuple[LLM, Any]) -> None:
    llm, model = qwen
    texts, outputs = traffic(llm)
    loss = losses(model, [*texts.values()], [*outputs.values()], HALF_CONFIG)
    few = list(texts)[:12]
    alone = losses(
        model, [texts[i] for i in few], [greedy(llm, [texts[i]], len(outputs[i]))[0] for i in few], HALF_CONFIG
    )
    print("in traffic:", summary(loss), "| alone:", summary(alone))
    assert loss.mean() < 2 * alone.mean() + 1e-3
