"""Finds the rotary embedding of each layer of a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kvllm.compression.rope_probe import (
    REMEDY,
    matching_rope,
    probe_positions,
    run_decoder,
    same_hidden_states,
    transformers_candidates,
)
from kvllm.errors import UsageError
from kvllm.methods.rope import Rope

NAME = "kvllm_rope_probe"
_queries: ContextVar[dict[int, Tensor]] = ContextVar("queries")


def rope_of(model: PreTrainedModel, layers: Sequence[int] | None = None) -> Rope | None:
    """The rotary embedding of these layers, by index (default: all); None if none of them has one.

    Runs the model once on a few tokens. Raises UsageError if it cannot determine a layer's rotary embedding.
    """
    try:
        config, decoder = model.config.get_text_config(), model.get_decoder()
        positions = probe_positions(config.max_position_embeddings, model.device)
        candidates = transformers_candidates(decoder, config.max_position_embeddings)
        chosen = range(config.num_hidden_layers) if layers is None else layers
        queries = _layer_queries(model, decoder, positions, config, chosen)
        return Rope.of_layers([matching_rope(q, positions, candidates) for q in queries])
    except Exception as e:  # a model's own code may fail in any way
        raise UsageError(
            f"{type(model).__name__}: its rotary embedding could not be determined ({type(e).__name__}: {e}); {REMEDY}."
        ) from e


def _layer_queries(
    model: PreTrainedModel, decoder: nn.Module, positions: Tensor, config: Any, layers: Sequence[int]
) -> list[Tensor]:
    """The queries of one hidden state at each position: for each layer, [num_positions, num_heads, head_dim]."""
    before = model.config._attn_implementation
    token = _queries.set({})
    model.set_attn_implementation(NAME)
    try:
        with same_hidden_states(m for m in decoder.modules() if hasattr(m, "layer_idx")):
            run_decoder(decoder, positions, config.hidden_size, model.dtype)
        taken = _queries.get()
    finally:
        model.set_attn_implementation(before)
        _queries.reset(token)
    if missing := set(layers) - set(taken):
        raise UsageError(f"layers {sorted(missing)} do not use transformers' attention interface")
    return [taken[i] for i in layers]


def _take(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function during the probe; shapes as in `kvllm.reference.attention.attend`."""
    _queries.get()[module.layer_idx] = query[0].transpose(0, 1)  # type: ignore[index]
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(NAME, _take)
