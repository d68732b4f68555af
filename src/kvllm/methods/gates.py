"""Trained gates: small networks, one per layer and KV head, that map a cached key and value to one logit.

A safetensors file holds the gates of one model, in float32 or bfloat16. A gate has 2 * head_dim inputs: the cached key
with RoPE undone, then the cached value.

    weight_out  [num_layers, num_kv_heads, n]          n: hidden, or inputs without a hidden layer
    bias_out    [num_layers, num_kv_heads]
    weight_in   [num_layers, num_kv_heads, hidden, inputs]   with a hidden layer (SiLU), else absent
    bias_in     [num_layers, num_kv_heads, hidden]

num_layers counts the model's layers up to and including the last compressed one.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

from kvllm.errors import UsageError
from kvllm.methods.base import LayerShape, Method, Window
from kvllm.methods.files import read_tensors

OUT, HIDDEN = ("weight_out", "bias_out"), ("weight_in", "bias_in")
WHAT = "a file of gate weights trained for the served model"


class Gated(Method):
    """A method whose field `gates` is the path of a file of gates."""

    gates: str

    def __post_init__(self) -> None:
        if not self.gates:
            raise UsageError(f"gates='': required; give the path of {WHAT}.")
        if not Path(self.gates).is_file():
            raise UsageError(f"gates={self.gates!r}: no such file; give the path of {WHAT}.")
        load_gates(self.gates, torch.device("cpu"))

    @property
    def uses_rope(self) -> bool:
        return True

    @property
    def counts_positions(self) -> bool:
        return True

    def check_layers(self, shape: LayerShape) -> None:
        num_layers, num_kv_heads, inputs = shape_of(load_gates(self.gates, torch.device("cpu")))
        if (num_kv_heads, inputs) != (shape.num_kv_heads, 2 * shape.head_dim) or num_layers < shape.num_layers:
            raise UsageError(
                f"gates={self.gates!r}: trained for a model with {num_layers} layers, {num_kv_heads} KV heads and "
                f"head_dim {inputs // 2}, but this one has {shape.num_layers} layers, {shape.num_kv_heads} KV heads "
                f"(on this rank) and head_dim {shape.head_dim}; use gates trained for this model."
            )

    def logits(self, window: Window) -> Tensor:
        """[batch, num_kv_heads, num_tokens] in float32: the gate's output for each candidate."""
        gates = {name: x[window.layers] for name, x in load_gates(self.gates, window.keys.device).items()}
        keys, values = (x.float().transpose(1, 2) for x in (window.keys, window.values))
        if window.rope is not None:
            keys = window.rope.undo(keys, window.positions)
        return gate_logits(torch.cat([keys, values], dim=-1), gates)


def gate_logits(inputs: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """inputs: [batch, num_kv_heads, num_tokens, inputs]; gates: [batch, ...]

    returns [batch, num_kv_heads, num_tokens] in float32
    """
    if "weight_in" in gates:
        inputs = silu(_rows(inputs, gates["weight_in"]) + gates["bias_in"].unsqueeze(2))
    return _rows(inputs, gates["weight_out"].unsqueeze(2)).squeeze(-1) + gates["bias_out"].unsqueeze(-1)


def _rows(inputs: Tensor, weights: Tensor) -> Tensor:
    """[batch, num_kv_heads, num_tokens, n]; weights: [batch, num_kv_heads, n, inputs]

    In float64: in float32 the rounding would depend on the batch size.
    """
    return torch.einsum("bhti,bhni->bhtn", inputs.double(), weights.double()).float()


def shape_of(gates: dict[str, Tensor]) -> tuple[int, int, int]:
    """Number of layers, KV heads and inputs."""
    weight = gates["weight_in"] if "weight_in" in gates else gates["weight_out"]
    return weight.shape[0], weight.shape[1], weight.shape[-1]


@lru_cache(maxsize=8)
def load_gates(path: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file of gates, in float32. Raises UsageError if the file is not valid."""
    tensors = read_tensors("gates", path, device)
    names = OUT + (HIDDEN if tensors.keys() & set(HIDDEN) else ())
    if tensors.keys() != set(names):
        raise UsageError(
            f"gates={path!r}: contains the tensors {', '.join(sorted(tensors)) or 'none'}, but needs {', '.join(OUT)} "
            f"and, for a hidden layer, {', '.join(HIDDEN)}. Gates that read hidden states are not supported."
        )
    _check_shapes(path, {name: list(tensors[name].shape) for name in names})
    if any(not x.isfinite().all() for x in tensors.values()):
        raise UsageError(f"gates={path!r}: contains nan or infinite weights.")
    return {name: x.float() for name, x in tensors.items()}


def _check_shapes(path: str, found: dict[str, list[int]]) -> None:
    """Raise UsageError unless the tensors agree on the number of layers, heads and hidden units."""
    first = "weight_in" if "weight_in" in found else "weight_out"
    layers, heads, hidden, inputs = (*found[first], 0, 0, 0, 0)[:4]
    expected = {"weight_out": [layers, heads, hidden], "bias_out": [layers, heads]}
    if first == "weight_in":
        expected |= {"weight_in": [layers, heads, hidden, inputs], "bias_in": [layers, heads, hidden]}
    for name, shape in found.items():
        if shape != expected[name] or 0 in shape:
            raise UsageError(f"gates={path!r}: {name} has shape {shape}, but {first} implies {expected[name]}.")
