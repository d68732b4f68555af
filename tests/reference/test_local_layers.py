"""Models some of whose layers look back over a window or a chunk: those keep the whole text, and are masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvllm.config import KvConfig
from kvllm.layers import Local
from kvllm.reference import Request, feed, generate
from tests.reference.models import text

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
    "num_local_experts": 4, "num_experts_per_tok": 1, "global_head_dim": 32, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
CHUNKED = {"attention_chunk_size": 24, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
           "intermediate_size_mlp": 48}  # fmt: skip
CONFIG = KvConfig(window_size=32, buffer_size=16, retention_ratio=0.5)


def tiny_model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **options), dtype=torch.float32).eval()


KINDS = [
    ("gpt_oss", SLIDING), ("gemma3_text", SLIDING), ("gemma4_text", SLIDING), ("exaone4", SLIDING),
    ("llama4_text", CHUNKED),
]  # fmt: skip


@pytest.mark.parametrize("kind, options", KINDS, ids=[kind for kind, _ in KINDS])
def test_uncompressed_answers_are_those_of_transformers(kind: str, options: dict[str, Any]) -> None:
    """In steps of several lengths, so that masks of rows in the middle count."""
    model, ids = tiny_model(kind, **options), text(90)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    request, rows = Request(model, 40), []
    for start, end in ((0, 40), (40, 41), (41, 60), (60, 90)):
        rows.append(request.step(ids[start:end]))
    torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=2e-4)  # other order of sums


def test_cohere_2_looks_back_one_token_further_than_in_transformers() -> None:
    """As vLLM has it, and as the model was trained: `sliding_window` tokens before the token itself."""
    model, ids = tiny_model("cohere2", **SLIDING), text(60)
    one_more = tiny_model("cohere2", **SLIDING | {"sliding_window": 25})
    one_more.load_state_dict(model.state_dict())
    with torch.inference_mode():
        expected = one_more(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(Request(model, 60).step(ids), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind, options", KINDS, ids=[kind for kind, _ in KINDS])
def test_only_layers_of_full_attention_are_compressed(kind: str, options: dict[str, Any]) -> None:
    made = generate(tiny_model(kind, **options), text(20), 180, CONFIG, block_size=16)
    assert len(made.kept) == 4 and {kept.shape[0] for kept in made.kept} == {1}  # of two layers
    request = Request(tiny_model(kind, **options), 20, CONFIG, 16)
    feed(request, [*text(20), *made.token_ids])
    local, full = request.layers
    assert local.local == Local(24, chunked=kind == "llama4_text") and full.local is None
    assert len(local.keys) == request.num_computed_tokens == 199
    assert len(full.keys) == request.physical_len == 199 - 4 * 16
    assert request.compressed == [full]
