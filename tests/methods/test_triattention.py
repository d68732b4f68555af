from __future__ import annotations

import cmath

import pytest
import torch
from safetensors.torch import save_file

from kvllm.config import KvConfig
from kvllm.methods import make_method
from kvllm.methods.base import LayerShape
from kvllm.methods.rope import frequencies
from kvllm.methods.triattention import TriAttention, save_statistics
from tests.methods.loops import group_size, per_head
from tests.methods.test_all_methods import WINDOWS

THETA, DIM, HEADS, LAYERS = 50.0, 8, 6, 5
PAIRS = DIM // 2
SAMPLES = torch.randn(LAYERS, HEADS, 40, DIM, generator=torch.Generator().manual_seed(2)) + torch.linspace(-1, 1, DIM)
SCALE = torch.tensor([1.0, 0.9, 0.8, 1.1])


@pytest.fixture
def statistics(tmp_path) -> str:
    path = str(tmp_path / "model.safetensors")
    save_statistics(path, SAMPLES, frequencies(THETA, DIM), SCALE)
    return path


def scores_by_loops(window):
    """The published sum, with keys before RoPE, one distance and one frequency at a time."""

    def score(b, h):
        now = int(window.positions[b, h, -1]) + int(window.query_positions.max()) - (window.num_tokens - 1)
        best = torch.full((window.num_tokens,), -torch.inf, dtype=torch.float64)
        for g in range(group_size(window)):
            sample = SAMPLES[int(window.layers[b]), h * group_size(window) + g].double()
            row = []
            for t in range(window.num_tokens):
                position, total = int(window.positions[b, h, t]), 0.0
                for f in range(PAIRS):
                    rotation = THETA ** (-2 * f / DIM)
                    stored = complex(float(window.keys[b, t, h, f]), float(window.keys[b, t, h, f + PAIRS]))
                    key = stored * cmath.exp(-1j * rotation * position)
                    queries = [complex(q[f], q[f + PAIRS]) for q in sample.tolist()]
                    mean = sum(queries) / len(queries)
                    spread = sum(abs(q) for q in queries) / len(queries) - abs(mean)
                    distances = [now - position + 2**i for i in range(17)]
                    aligned = sum((mean * key.conjugate() * cmath.exp(1j * rotation * d)).real for d in distances)
                    total += float(SCALE[f]) ** 2 * (aligned / len(distances) + spread * abs(key))
                row.append(total)
            x = torch.tensor(row, dtype=torch.float64)
            best = best.maximum((x - x.mean()) / x.std(correction=0))
        return best

    return per_head(window, score)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "group_size 1"])
def test_scores_equal_the_definition(name, statistics):
    window = WINDOWS[name]
    torch.testing.assert_close(
        TriAttention(statistics=statistics).score(window), scores_by_loops(window), rtol=1e-4, atol=1e-4
    )


def test_the_file_must_be_named_and_exist(tmp_path):
    with pytest.raises(ValueError, match="statistics=.*: required; give the path"):
        make_method(KvConfig(method="triattention"))
    with pytest.raises(ValueError, match="statistics='/no/such/file': no such file"):
        make_method(KvConfig(method="triattention", method_options={"statistics": "/no/such/file"}))


def test_the_file_must_be_one_of_ours(tmp_path):
    text = tmp_path / "text"
    text.write_text("not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        TriAttention(statistics=str(text))
    other = tmp_path / "other.safetensors"
    save_file({"mean_real": torch.zeros(1, 1, 4)}, other)
    with pytest.raises(ValueError, match="has no tensor 'mean_imag'"):
        TriAttention(statistics=str(other))


def test_statistics_of_another_model_are_refused(statistics):
    method = make_method(KvConfig(method="triattention", method_options={"statistics": statistics}))
    method.check_layers(LayerShape(LAYERS, HEADS, 2, DIM))
    for shape in (
        LayerShape(LAYERS, 4, 2, DIM),
        LayerShape(LAYERS, HEADS, 2, 16),
        LayerShape(LAYERS + 1, HEADS, 2, DIM),
    ):
        with pytest.raises(ValueError, match="a model with 5 layers, 6 heads and head_dim 8, but this one has"):
            method.check_layers(shape)
