"""Measures which rotary embedding each layer applies to its queries.

A model's modules show which rotary embeddings exist, but not reliably which of them a layer applies: layers may skip it
(SmolLM3), choose among several (Gemma 3), or get it as an argument. So every attention layer gets the same hidden state
at several positions, and its queries then differ by exactly the rotation that it applies, if any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvllm.methods.rope import Rope

REMEDY = "use method_options lookahead=0, or another method"
# Spread to show both slow and fast pairs of dimensions; below the length from which Llama 4 and others scale queries by
# position.
_PROBED = (0, 1, 2, 5, 17, 61, 257, 1023, 4095)
# Largest relative difference of queries that counts as rounding: in float32 from sines of thousands of radians, in
# bfloat16 from sines and queries. A wrong embedding is off by at least 0.1.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
_HALF_TOLERANCE = 3e-2


def probe_positions(max_len: int, device: torch.device | str) -> Tensor:
    """The positions at which queries are measured, below `max_len`: [num_positions] int64, ascending from 0."""
    return torch.tensor([p for p in _PROBED if p < max(max_len, 2)], device=device)


def probe_hidden_states(num_positions: int, hidden_size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[num_positions, hidden_size]: the same random hidden state at every position."""
    one = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(0))
    return one.to(dtype).to(device).expand(num_positions, -1).contiguous()


def matching_rope(queries: Tensor, positions: Tensor, candidates: Sequence[Rope]) -> Rope | None:
    """The candidate that rotated the queries, or None if they are not rotated.

    queries:   [num_positions, num_heads, head_dim], of the same hidden state at each position
    positions: [num_positions], the first of which is 0
    Raises ValueError if no candidate explains how the queries depend on the position.
    """
    tolerance = _TOLERANCE.get(queries.dtype, _HALF_TOLERANCE)
    queries = queries.double()
    length = queries[0].norm()

    def error(expected: Tensor) -> float:
        return float(((queries - expected).norm(dim=(1, 2)) / length).max())

    still = queries[:1].expand_as(queries)
    if error(still) <= tolerance:
        return None
    errors = {
        i: error(rope.rotation(positions[:, None], queries.shape[-1], torch.float64).apply(still))
        for i, rope in enumerate(candidates)
        if 2 * rope.num_pairs <= queries.shape[-1]
    }
    best = min(errors, key=lambda i: errors[i], default=None)
    if best is None or not errors[best] <= tolerance:
        raise ValueError("none of the model's rotary embeddings explains how its queries depend on the position")
    return candidates[best]


def transformers_candidates(decoder: nn.Module, longest: int) -> list[Rope]:
    """The rotary embeddings that a transformers decoder may apply: each frequency table, interleaved or not.

    longest: maximum text length in tokens
    Raises ValueError if frequencies change within that length.
    """
    tables: list[Tensor] = []
    for module in decoder.modules():
        for name, table in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name or table.ndim != 1:
                continue
            _check_constant(module, name.removesuffix("inv_freq").removesuffix("_"), longest)
            if not any(torch.equal(table, other) for other in tables):
                tables.append(table)
    return [Rope(table.double(), interleaved) for table in tables for interleaved in (False, True)]


def _check_constant(module: nn.Module, layer_type: str, longest: int) -> None:
    """Raise ValueError if transformers' `dynamic_rope_update` replaces the frequencies in texts of that length."""
    rope_type: Any = getattr(module, "rope_type", "default")
    parameters: Any = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if isinstance(rope_type, dict):
        rope_type, parameters = rope_type.get(layer_type, "default"), parameters.get(layer_type) or {}
    if "longrope" in rope_type:
        limit = parameters.get("original_max_position_embeddings", 0)
    elif "dynamic" in rope_type:
        limit = getattr(module, "max_seq_len_cached", 0)
    else:
        return
    if longest > limit:
        raise ValueError(
            f"rope_type={rope_type!r} changes its frequencies in texts of more than {limit} tokens, "
            f"but the maximum length is {longest}"
        )


@contextmanager
def same_hidden_states(attentions: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context, transformers attention modules see the first token's hidden state at every position.

    So hidden states that depend on the position, as with learned position embeddings, have no effect.
    """
    hooks = [module.register_forward_pre_hook(_repeat_first, with_kwargs=True) for module in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _repeat_first(
    module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states = arguments[0] if arguments else options["hidden_states"]  # [1, num_positions, hidden_size]
    states = states[:, :1].expand_as(states).contiguous()
    return ((states, *arguments[1:]), options) if arguments else ((), options | {"hidden_states": states})


def run_decoder(decoder: nn.Module, positions: Tensor, hidden_size: int, dtype: torch.dtype) -> None:
    """Run a transformers decoder once, over one token at each position."""
    states = probe_hidden_states(len(positions), hidden_size, dtype, positions.device)
    options: dict[str, Any] = {}
    if width := getattr(decoder, "hidden_size_per_layer_input", None):  # Gemma 4 would look them up by the token
        num_layers: Any = decoder.config.num_hidden_layers  # type: ignore[union-attr]
        options["per_layer_inputs"] = states.new_zeros(1, len(positions), num_layers, width)
    with torch.no_grad():
        # `forward` rather than a call, which vLLM wraps with compilation.
        decoder.forward(inputs_embeds=states[None], position_ids=positions[None], use_cache=False, **options)
