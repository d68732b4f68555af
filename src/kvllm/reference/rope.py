"""The rotary embedding of a transformers model, as the methods need to know it."""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedModel

from kvllm.errors import UsageError
from kvllm.methods.rope import Rope, check_same_in_every_layer


def rope_of(model: PreTrainedModel) -> Rope | None:
    """None where the model has no RoPE; UsageError where it cannot be told which dimensions turn together."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return None
    check_same_in_every_layer(model.config.get_text_config(), type(model).__name__)
    # Every model of transformers has its own copy of this function, so it is asked and not looked up.
    rotate_half = getattr(sys.modules[type(model).__module__], "rotate_half", None)
    turned = rotate_half(torch.arange(4)).tolist() if rotate_half else None
    if turned not in ([-2, -3, 0, 1], [-1, 0, -3, 2]):
        raise UsageError(
            f"{type(model).__name__}: which dimensions its RoPE turns together is not known; "
            "use method_options lookahead=0, or another method."
        )
    return Rope(rotary.inv_freq.double(), interleaved=turned == [-1, 0, -3, 2])
