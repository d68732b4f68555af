"""The methods with trained gates: `trimkv` and `dms`."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvllm.config import KvConfig
from kvllm.methods import make_method
from kvllm.methods.base import LayerShape
from kvllm.methods.dms import DMS
from kvllm.methods.trimkv import TrimKV
from tests.methods.loops import per_head, position_of
from tests.methods.windows import random_window

LAYERS, DIM = 5, 8
THETA = 10000.0  # random_window's


def random_gates(num_layers: int, num_kv_heads: int, head_dim: int, hidden: int | None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    n = hidden or 2 * head_dim
    tensors = {
        "weight_out": torch.randn(num_layers, num_kv_heads, n, generator=g),
        "bias_out": torch.randn(num_layers, num_kv_heads, generator=g),
    }
    if hidden:
        tensors["weight_in"] = torch.randn(num_layers, num_kv_heads, hidden, 2 * head_dim, generator=g) / 4
        tensors["bias_in"] = torch.randn(num_layers, num_kv_heads, hidden, generator=g)
    return tensors


def saved(tmp_path, tensors) -> str:
    tmp_path.mkdir(exist_ok=True)
    path = str(tmp_path / "gates.safetensors")
    save_file(tensors, path)
    return path


def logit_by_loops(gates, window, b, h, t) -> float:
    """The gate's logit of one token, its key turned back by RoPE one pair at a time."""
    key, position = window.keys[b, t, h].tolist(), int(window.positions[b, h, t])
    inputs = [0.0] * DIM
    for f in range(DIM // 2):
        angle = -position * THETA ** (-2 * f / DIM)
        x, y = key[f], key[f + DIM // 2]
        inputs[f] = x * math.cos(angle) - y * math.sin(angle)
        inputs[f + DIM // 2] = x * math.sin(angle) + y * math.cos(angle)
    inputs += window.values[b, t, h].tolist()
    layer = int(window.layers[b])
    if "weight_in" in gates:
        rows = gates["weight_in"][layer, h].tolist(), gates["bias_in"][layer, h].tolist()
        sums = [sum(w * x for w, x in zip(row, inputs, strict=True)) + bias for row, bias in zip(*rows, strict=True)]
        inputs = [x / (1 + math.exp(-x)) for x in sums]
    weights = gates["weight_out"][layer, h].tolist()
    return sum(w * x for w, x in zip(weights, inputs, strict=True)) + float(gates["bias_out"][layer, h])


@pytest.mark.parametrize("hidden", [None, 3])
def test_scores_equal_the_definition(tmp_path, hidden):
    gates, window = random_gates(LAYERS, 2, DIM, hidden), random_window(batch=3)
    path = saved(tmp_path, gates)

    def logits(b: int, h: int) -> Tensor:
        return torch.tensor([logit_by_loops(gates, window, b, h, t) for t in range(24)], dtype=torch.float64)

    def retention(b: int, h: int) -> Tensor:
        newest = max(position_of(window, 0, q) for q in range(5))
        beta = [1 / (1 + math.exp(-x)) for x in logits(b, h).tolist()]
        return torch.tensor([(newest - t + 1) * math.log(beta[t]) for t in range(24)], dtype=torch.float64)

    torch.testing.assert_close(DMS(gates=path).score(window), -per_head(window, logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(TrimKV(gates=path).score(window), per_head(window, retention), rtol=1e-4, atol=1e-4)


def test_retention_decays_with_age(tmp_path):
    """Equal gates: the newest stay. A lasting token outlives newer ones."""
    gates = {"weight_out": torch.zeros(LAYERS, 1, 2 * DIM), "bias_out": torch.zeros(LAYERS, 1)}
    gates["weight_out"][:, :, DIM] = 1.0  # the value's first dimension
    window = random_window(batch=1, num_kv_heads=1)
    window.values[...] = 0
    method = TrimKV(gates=saved(tmp_path, gates))
    assert method.compress(window, 3).indices.tolist() == [[[21, 22, 23]]]
    window.values[0, 4, 0, 0] = 10
    assert method.compress(window, 3).indices.tolist() == [[[4, 22, 23]]]


@pytest.mark.parametrize("name", ["trimkv", "dms"])
def test_the_file_must_be_named_and_exist(name):
    with pytest.raises(ValueError, match="gates='': required; give the path of a file of gate weights"):
        make_method(KvConfig(method=name))
    with pytest.raises(ValueError, match="gates='/no/such': no such file"):
        make_method(KvConfig(method=name, method_options={"gates": "/no/such"}))


def test_the_file_must_be_one_of_gates(tmp_path):
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        DMS(gates=str(tmp_path / "text"))
    good = random_gates(LAYERS, 2, DIM, hidden=3)
    for change, message in (
        ({"q_proj": torch.zeros(4, 4)}, "contains the tensors .*q_proj.*, but needs weight_out, bias_out"),
        (
            {"bias_in": torch.zeros(LAYERS, 2, 4)},
            r"bias_in has shape \[5, 2, 4\], but weight_in implies \[5, 2, 3\]",
        ),
        ({"weight_in": torch.zeros(3, 16)}, "has shape .*, but weight_in implies"),
        ({"bias_out": torch.full((LAYERS, 2), torch.nan)}, "nan or infinite weights"),
    ):
        with pytest.raises(ValueError, match=message):
            DMS(gates=saved(tmp_path / str(len(message)), good | change))


@pytest.mark.parametrize(
    "shape", [LayerShape(5, 6, 3, DIM), LayerShape(5, 6, 2, 2 * DIM), LayerShape(6, 6, 2, DIM)], ids=str
)
def test_gates_of_another_model_are_refused(tmp_path, shape):
    method = TrimKV(gates=saved(tmp_path, random_gates(LAYERS, 2, DIM, hidden=None)))
    method.check_layers(LayerShape(5, 6, 2, DIM))
    with pytest.raises(ValueError, match="trained for a model with 5 layers, 2 KV heads and head_dim 8, but"):
        method.check_layers(shape)
