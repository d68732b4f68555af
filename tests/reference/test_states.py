"""Recurrent layers: their states go on from step to step, and only layers of full attention are compressed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvllm.config import KvConfig
from kvllm.reference import Request
from kvllm.reference.states import states_of

CONFIG = KvConfig(window_size=32, buffer_size=16, retention_ratio=0.5)
SIZES: dict[str, Any] = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=512, initializer_range=0.1, dtype="float32", bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention", "mlp"], num_hidden_layers=3, mamba_num_heads=4, mamba_head_dim=32,
        ssm_state_size=16, n_groups=1, chunk_size=32,
    ),
    "qwen3_next": dict(
        num_hidden_layers=2, full_attention_interval=2, mlp_only_layers=[0, 1], linear_key_head_dim=16,
        linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **(SIZES | MODELS[request.param]))
    return AutoModelForCausalLM.from_config(config).float().eval()


def tokens(num: int) -> list[int]:
    return torch.randint(256, (num,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.inference_mode()
def test_steps_of_any_length_are_one_pass(model: Any) -> None:
    ids = tokens(120)
    request, parts = Request(model, 10), []
    for start, end in ((0, 30), (30, 31), (31, 32), (32, 97), (97, 120)):
        parts.append(request.step(ids[start:end]))
    torch.testing.assert_close(torch.cat(parts), model(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_fork_compresses_attention_and_leaves_states_alone(model: Any) -> None:
    """What is forked off changes nothing of the whole; from the first event on the two differ."""
    ids = tokens(140)
    full = Request(model, 10, max_queries=CONFIG.query_span)
    full.step(ids[:60])
    forked = Request.fork(full, CONFIG)
    same = forked.step(ids[60:64])
    torch.testing.assert_close(same, full.step(ids[60:64]), rtol=1e-4, atol=1e-4)
    ours, whole = forked.step(ids[64:90]), full.step(ids[64:90])
    assert len(forked.kept) == 1 and forked.physical_len == 90 - 16 and full.physical_len == 90
    assert len(forked.compressed) == 1 and (ours - whole).abs().max() > 1e-3


def test_models_without_recurrent_layers_have_no_states() -> None:
    assert states_of(None, [None, None]) is None  # type: ignore[arg-type]
