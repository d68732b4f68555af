"""DMS (arXiv:2506.05345): a trained gate decides which tokens to evict."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Window
from kvllm.methods.gates import Gated
from kvllm.options import strict_dataclass


@register("dms")
@strict_dataclass
class DMS(Gated):
    """Keep the tokens with the lowest eviction logit, as computed by a trained gate.

    Same: a gate for each layer and KV head computes each token's eviction logit once; tokens are evicted only after
    they leave the buffer (in DMS, after 256 tokens).
    Differs: a fixed number of tokens is kept, those with the lowest logits (DMS evicts all above 0, so heads differ in
    length). The gate reads the cached key and value, not the hidden state or a query channel, so published checkpoints,
    which are trained together with the model's weights, cannot be loaded. KvLLM does not train gates; the file format
    is described in `kvllm.methods.gates`.
    """

    gates: str = Field("", description="Path of a file of gates trained for the served model.")

    def score(self, window: Window) -> Tensor:
        return -self.logits(window)
