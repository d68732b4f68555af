"""Survivors in four bits beside an fp8 cache, capped logits and attention sinks, under CUDA graphs. Needs a GPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from transformers import Gemma2Config, GptOssConfig
from vllm.distributed import cleanup_dist_env_and_memory

from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
from kvllm.reference import Request, feed, load_model
from tests.gpu.test_engine_gpu import greedy, model_dir, prompt, reference_model, start  # noqa: F401
from tests.gpu.test_packed_gpu import CONFIG, OPTIONS, summary
from tests.models import VOCAB_SIZE, save_random_model
from tests.random_traffic import run_traffic

pytestmark = pytest.mark.engine

NUM_TOKENS = 500
LENGTHS = (1, 16, 70, 300)  # of prompts


def logprobs(model: Any, prompt_ids: list[int], output: list[int], config: KvConfig | None, **options: Any) -> Tensor:
    """[len(output), vocab_size]: what the reference says of each token of the output."""
    request = Request(model, len(prompt_ids), config, packed=bool(config), **options)
    found = feed(request, [*prompt_ids, *output], keep_full=True).full_logprobs
    assert found is not None
    return found[len(prompt_ids) - 1 :]


def check(
    model: Any, other: tuple[Any, KvConfig], prompts: list[list[int]], outputs: list[list[int]], **options: Any
) -> tuple[float, float]:  # fmt: skip
    """How far the outputs fall short of the reference's best tokens, and how far the reference in bfloat16 does.

    other: a reference and its options of which the outputs must fall short twice as far, so that the figures can tell
    """
    half = copy.deepcopy(model).bfloat16()
    engine, own, worse = [], [], []
    for p, o in zip(prompts, outputs, strict=True):
        rows, chosen = logprobs(model, p, o, CONFIG, **options), torch.tensor(o, device=model.device)[:, None]
        best = rows.max(dim=-1).values
        engine.append(best - rows.gather(1, chosen)[:, 0])
        half_best = logprobs(half, p, o, CONFIG, **options).argmax(dim=-1, keepdim=True)
        own.append(best - rows.gather(1, half_best)[:, 0])
        rows = logprobs(other[0], p, o, other[1], **options)
        worse.append(rows.max(dim=-1).values - rows.gather(1, chosen)[:, 0])
    losses = {"packed": engine, "reference in bfloat16": own, "the other reference": worse}
    print({name: summary(torch.cat(loss).cpu()) for name, loss in losses.items()})
    packed, in_half, far = (float(torch.cat(loss).mean()) for loss in losses.values())
    assert far > 2 * packed
    return packed, in_half


def test_an_fp8_cache(model_dir: Path, reference_model: Any) -> None:  # noqa: F811
    """Prompt and tail in fp8, survivors in four bits, in one pool; preemption, and prefill over packed survivors."""
    options: dict[str, Any] = {"kv_cache_dtype": "fp8", "block_size": 32, "num_gpu_blocks_override": 80}
    llm = start(model_dir, CONFIG, **(OPTIONS | options))
    prompts = [prompt(n, n) for n in LENGTHS]
    outputs = greedy(llm, prompts, NUM_TOKENS)
    stats = engine_stats(llm)
    assert stats["num_windows_compressed"] >= 2 * len(prompts)
    assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
    whole = greedy(llm, prompts, NUM_TOKENS, ratio=1.0)
    loss = [
        rows.max(dim=-1).values - rows.gather(1, torch.tensor(o, device=rows.device)[:, None])[:, 0]
        for p, o in zip(prompts, whole, strict=True)
        for rows in [logprobs(reference_model, p, o, None)]
    ]
    print("nothing compressed, fp8:", summary(torch.cat(loss).cpu()))
    other = reference_model, replace(CONFIG, retention_ratio=0.4375)  # keeps fewer
    check(reference_model, other, prompts, outputs, block_size=32, cache_dtype="fp8")

    rng, before = random.Random(0), engine_stats(llm)
    texts = {str(i): prompt(rng.randrange(1, 200), i) for i in range(30)}
    lengths = {i: rng.randrange(10, 700) for i in texts}
    results, _ = run_traffic(
        llm.llm_engine, texts, lengths, rng, lambda *_: rng.randrange(0, 3), abort_chance=0.0, detokenize=False
    )
    after = engine_stats(llm)
    print("preemptions:", after["num_preemptions"] - before["num_preemptions"])
    assert after["num_preemptions"] > before["num_preemptions"]
    assert after["free_kv_blocks"] == after["num_kv_blocks"]
    names = sorted(texts)
    check(
        reference_model, other, [texts[i] for i in names], [results[i] for i in names], block_size=32, cache_dtype="fp8"
    )
    llm.llm_engine.engine_core.shutdown()


def without_cap(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def without_sinks(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)


LAYERS = ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize(
    "config_class, options, without",
    [
        (
            Gemma2Config,
            {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
            without_cap,
        ),
        (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}, without_sinks),
    ],
    ids=["soft cap", "sinks"],
)
def test_soft_caps_and_sinks(
    config_class: type, options: dict[str, Any], without: Callable[[Any], None], tmp_path: Path
) -> None:
    mixed = {"sliding_window": 64, "layer_types": LAYERS, "max_position_embeddings": 2048}
    folder = save_random_model(tmp_path, config_class, **mixed, **options)
    model = load_model(folder, device="cuda")
    if (
        config_class is Gemma2Config
    ):  # else its residual stream is the token itself, which it repeats whatever is capped
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.data.fill_(30.0)
        model.save_pretrained(folder)
    if config_class is GptOssConfig:  # sinks that weigh as much as some hundred tokens; new ones are near 0
        for layer in model.model.layers:
            sinks = layer.self_attn.sinks.data
            sinks.copy_(torch.linspace(4, 7, len(sinks)))
        model.save_pretrained(folder)
    # Engines of one process share their process groups, and those of a dense model have none for experts.
    cleanup_dist_env_and_memory()
    llm = start(folder, CONFIG, **OPTIONS)
    prompts = [prompt(n, n) for n in LENGTHS]
    outputs = greedy(llm, prompts, NUM_TOKENS)
    stats = engine_stats(llm)
    assert stats["num_windows_compressed"] >= 2 * len(prompts)
    assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
    assert all(max(o) < VOCAB_SIZE for o in outputs)
    bare = copy.deepcopy(model)
    without(bare)
    packed, in_half = check(model, (bare, CONFIG), prompts, outputs)
    assert packed < 1.5 * in_half + 0.02
    llm.llm_engine.engine_core.shutdown()
