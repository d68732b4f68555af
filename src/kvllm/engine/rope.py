"""The rotary embedding of a model inside vLLM, as the methods need to know it."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from kvllm.methods.rope import Rope


def rope_of(model: torch.nn.Module) -> Rope | None:
    """None where the model has no RoPE; ValueError where its layers have different ones."""
    modules = {id(m): m for m in model.modules() if isinstance(m, RotaryEmbeddingBase)}
    ropes = [_rope(m) for m in modules.values()]
    if not ropes:
        return None
    first = ropes[0]
    for other in ropes[1:]:
        if other.interleaved != first.interleaved or not torch.equal(other.frequencies, first.frequencies):
            raise ValueError(
                f"KvLLM: the layers of {type(model).__name__} have different rotary embeddings; "
                "use method_options lookahead=0, or another method."
            )
    return first


def _rope(module: RotaryEmbeddingBase) -> Rope:
    # Computed anew, since the module's own table is rounded to the model's dtype. It holds cosines and sines, as the
    # module's scaling has them; the angle between the first two places is what one token turns.
    cos, sin = module._compute_cos_sin_cache()[:2].double().chunk(2, dim=-1)
    angles = torch.atan2(sin, cos)
    device = next(module.buffers()).device
    return Rope((angles[1] - angles[0]).to(device), interleaved=not module.is_neox_style)
