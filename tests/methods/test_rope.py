from __future__ import annotations

import cmath

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvllm.methods.rope import Rope, frequencies, unrotate


def test_unrotating_inverts_the_rotation_of_transformers():
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5000.0,
        },
    )
    positions = torch.tensor([[0, 1, 7, 500, 4000]])
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 2, 5, 16, generator=generator)
    rotary = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(frequencies(5000.0, 16).float(), rotary.inv_freq)
    after, _ = apply_rotary_pos_emb(before, before, *rotary(before, positions))
    # transformers computes angles in float32: off by 2e-4 at position 4000
    torch.testing.assert_close(unrotate(after, positions[:, None], 5000.0), before, rtol=0, atol=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_pairs, head_dim", [(4, 8), (2, 8), (1, 6), (40, 80)])
def test_rotations_equal_complex_numbers(num_pairs, head_dim, interleaved):
    """Each pair is a complex number, rotated by its frequency per token; dimensions beyond the pairs are unchanged."""
    generator = torch.Generator().manual_seed(0)
    rope = Rope(torch.rand(num_pairs, generator=generator, dtype=torch.float64), interleaved)
    distances = torch.tensor([[0, 1, -3], [17, 4000, 100_001]])
    vectors = torch.randn(2, 3, head_dim, generator=generator)
    rotation = rope.rotation(distances, head_dim)
    for table in (rotation.cos, rotation.sin):
        assert table.shape == (2, 3, head_dim // 2) and table.dtype == torch.float32
    assert sorted(torch.cat([rotation.first, rotation.second]).tolist()) == list(range(head_dim))
    halves = rotation.first.tolist() == list(range(head_dim // 2)) and torch.equal(
        rotation.second, rotation.first + head_dim // 2
    )
    assert rotation.halves == halves

    expected = vectors.double()
    for index, distance in enumerate(distances.flatten().tolist()):
        vector = expected.view(-1, head_dim)[index]
        for i in range(num_pairs):
            pair = [2 * i, 2 * i + 1] if interleaved else [i, i + num_pairs]
            rotated = complex(*vector[pair].tolist()) * cmath.exp(1j * distance * float(rope.frequencies[i]))
            vector[pair] = torch.tensor([rotated.real, rotated.imag], dtype=torch.float64)
    actual = rotation.apply(vectors)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)  # float32 sines and cosines
    assert torch.equal(actual[0, 0], vectors[0, 0])  # no distance, no change
    assert torch.equal(actual[..., 2 * num_pairs :], vectors[..., 2 * num_pairs :])


def test_rotating_on_and_back_again():
    rope = Rope(frequencies(10000.0, 16))
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([5, 600, 70_000])
    rotated = rope.rotation(at, 16).apply(vectors)
    torch.testing.assert_close(unrotate(rotated, at, 10000.0), vectors, rtol=0, atol=1e-6)
