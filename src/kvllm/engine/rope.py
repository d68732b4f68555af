"""Finds the rotary embedding of each compressed layer of a model in vLLM."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import Phi3LongRoPEScaledRotaryEmbedding
from vllm.model_executor.models.transformers.base import Base as TransformersBackend

from kvllm.compression.rope_probe import (
    REMEDY,
    matching_rope,
    probe_hidden_states,
    probe_positions,
    run_decoder,
    same_hidden_states,
    transformers_candidates,
)
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.methods import make_methods
from kvllm.methods.rope import Rope

_POSITIONS = ("positions", "position_ids")
_HIDDEN_STATES = "hidden_states"


def rope_of(model: nn.Module, layers: Sequence[Any], config: Any, device: torch.device | str) -> Rope | None:
    """The rotary embedding of these attention layers, in this order; None if no layer has one.

    layers: the compressed `Attention` layers of `model`; config: vLLM's `ModelConfig`
    Runs each layer's query projection once. Raises UsageError if it cannot determine a layer's rotary embedding.
    """
    try:
        positions = probe_positions(config.max_model_len, device)
        parents = [_parent_of(layer, model) for layer in layers]
        with torch.no_grad(), _without_lora(model):
            if isinstance(model, TransformersBackend):
                decoder = model.model.get_decoder()
                candidates = transformers_candidates(decoder, config.max_model_len)
                others = [module for module in model.modules() if isinstance(module, Attention)]
                queries = _decoder_queries(decoder, parents, layers, others, positions, config)
            else:
                candidates = _candidates(model)
                states = probe_hidden_states(len(positions), config.get_hidden_size(), config.dtype, device)
                queries = [_layer_queries(*pair, positions, states) for pair in zip(parents, layers, strict=True)]
            return Rope.of_layers([matching_rope(q, positions, candidates) for q in queries])
    except Exception as e:  # a model's own code may fail in any way
        raise UsageError(
            f"KvLLM could not determine the rotary embedding of {type(model).__name__} ({type(e).__name__}: {e}); "
            f"{REMEDY}."
        ) from e


def rope_for(config: KvConfig, *arguments: Any) -> Rope | None:
    """`rope_of`, with its other arguments, if one of the methods that requests may have needs it; else None."""
    looking = [name for name, method in make_methods(config).items() if method.uses_rope]
    if not looking:
        return None
    try:
        return rope_of(*arguments)
    except UsageError as e:
        if config.method in looking:
            raise
        raise UsageError(f"request_methods={config.request_methods!r}: {looking[0]}: {e}") from e


def _parent_of(layer: nn.Module, model: nn.Module) -> nn.Module:
    for module in model.modules():
        if any(child is layer for child in module.children()):
            return module
    raise ValueError(f"no module of the model contains the layer {getattr(layer, 'layer_name', '')}")


def _layer_queries(parent: nn.Module, layer: Any, positions: Tensor, states: Tensor) -> Tensor:
    """The queries that a vLLM attention module passes to its attention layer, [num_positions, num_heads, head_dim]."""
    arguments: dict[str, Tensor] = {}
    for name, parameter in inspect.signature(parent.forward).parameters.items():
        if name in _POSITIONS:
            arguments[name] = positions
        elif name == _HIDDEN_STATES:
            arguments[name] = states
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            if not arguments.keys() & set(_POSITIONS):
                arguments[_POSITIONS[0]] = positions  # modules that do not use it ignore it
        else:
            raise ValueError(f"{type(parent).__name__}.forward takes {name}")
    taken: list[Tensor] = []

    def take(query: Tensor, *_: Any, **__: Any) -> Tensor:
        taken.append(query)
        raise _Taken

    try:
        with _replaced([layer], "forward", [take]):
            parent(**arguments)
    except _Taken:
        pass
    return _by_head(taken, layer)


class _Taken(Exception):
    """Raised once the queries are known, to skip the rest of the forward pass."""


def _decoder_queries(
    decoder: nn.Module,
    parents: Sequence[nn.Module],
    layers: Sequence[Any],
    others: Iterable[Any],
    positions: Tensor,
    config: Any,
) -> list[Tensor]:
    """`_layer_queries` for the Transformers backend, whose layers get their rotation from the decoder.

    The other attention layers run as well, but with zeros as their attention output, too.
    """
    every = [*layers, *(other for other in others if not any(other is layer for layer in layers))]
    taken: list[list[Tensor]] = [[] for _ in every]

    def taking(into: list[Tensor]) -> Callable[..., Tensor]:
        def take(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            into.append(query)
            return torch.zeros_like(query)

        return take

    with same_hidden_states(parents), _replaced(every, "forward", [taking(into) for into in taken]):
        run_decoder(decoder, positions, config.get_hidden_size(), config.dtype)
    return [_by_head(queries, layer) for queries, layer in zip(taken, layers, strict=False)]


def _by_head(taken: list[Tensor], layer: Any) -> Tensor:
    if len(taken) != 1:
        raise ValueError(f"the layer {getattr(layer, 'layer_name', '')} was called {len(taken)} times, not once")
    return taken[0].reshape(-1, layer.num_heads, layer.head_size)


@contextmanager
def _replaced(owners: Sequence[Any], name: str, values: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Within this context, override an attribute of the class on each of these objects."""
    # Not a hook, since the Transformers backend calls its layers' `forward` directly.
    for owner, value in zip(owners, values, strict=True):
        assert name not in vars(owner)
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner in owners:
            delattr(owner, name)


@contextmanager
def _without_lora(model: nn.Module) -> Iterator[None]:
    """Within this context LoRA adds nothing: without a batch, no adapter is chosen for the tokens."""
    adapted = [module for module in model.modules() if isinstance(module, BaseLinearLayerWithLoRA)]
    with _replaced(adapted, "_apply_lora_to_output", [lambda x, output: output] * len(adapted)):
        yield


def _candidates(model: nn.Module) -> list[Rope]:
    """The rotary embeddings of all vLLM rotary modules in the model, including parts other than the decoder."""
    ropes = (_rope(module) for module in model.modules())
    return [rope for rope in ropes if rope is not None]


def _rope(module: nn.Module) -> Rope | None:
    # Recomputed, since the module's own table is rounded to the model's dtype. The table holds scaled cosines and
    # sines; the angle between the first two positions is the rotation per token.
    if isinstance(module, Phi3LongRoPEScaledRotaryEmbedding):
        # vLLM chooses once, by max_model_len.
        factors = module.long_factor if module.use_long_rope else module.short_factor
        table, neox = module._compute_cos_sin_cache(2, factors, 1.0), True
    elif isinstance(module, RotaryEmbeddingBase):
        table, neox = module._compute_cos_sin_cache()[:2], module.is_neox_style
    else:
        return None
    if table.ndim != 2 or table.is_complex():  # of a vision tower
        return None
    cos, sin = table.double().chunk(2, dim=-1)
    angles = torch.atan2(sin, cos)
    return Rope((angles[1] - angles[0]).to(next(module.buffers()).device), interleaved=not neox)
