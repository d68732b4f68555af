from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvllm.methods.rope import frequencies, unrotate


def test_it_undoes_the_rotation_of_transformers():
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5000.0,
        },
    )
    places = torch.tensor([[0, 1, 7, 500, 4000]])
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 2, 5, 16, generator=generator)
    rotary = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(frequencies(5000.0, 16).float(), rotary.inv_freq)
    after, _ = apply_rotary_pos_emb(before, before, *rotary(before, places))
    # transformers computes angles in float32: off by 2e-4 at place 4000
    torch.testing.assert_close(unrotate(after, places[:, None], 5000.0), before, rtol=0, atol=1e-3)
