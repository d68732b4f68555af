"""The rotary embedding of a model inside vLLM, as the methods need to know it."""

from __future__ import annotations

import torch
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

from kvllm.errors import UsageError
from kvllm.methods.rope import Rope, check_same_in_every_layer


def rope_of(model: torch.nn.Module) -> Rope | None:
    """None where the model has no RoPE; UsageError where its layers have different ones, or one of an unknown kind."""
    package = rotary_embedding.__name__
    modules = [m for m in model.modules() if type(m).__module__.startswith(package)]
    modules = [m for m in modules if not isinstance(m, ApplyRotaryEmb)]  # a part of the others
    for module in modules:
        if not isinstance(module, RotaryEmbeddingBase):
            raise UsageError(
                f"KvLLM: how {type(module).__name__} of {type(model).__name__} turns queries is not known; "
                "use method_options lookahead=0, or another method."
            )
    ropes = [_rope(m) for m in modules]
    if not ropes:
        return None
    check_same_in_every_layer(getattr(model, "config", None), type(model).__name__)
    first = ropes[0]
    for other in ropes[1:]:
        if other.interleaved != first.interleaved or not torch.equal(other.frequencies, first.frequencies):
            raise UsageError(
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
