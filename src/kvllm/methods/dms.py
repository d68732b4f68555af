"""DMS (arXiv:2506.05345): a trained gate flags the tokens to be evicted."""

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
    """Keep the tokens that the gate is least sure to evict.

    Same: a gate for each layer and KV head gives every token the logit of its eviction, once, and the eviction waits
    until the token is `buffer_size` tokens old or more (DMS: 256).
    Differs: the number that is kept is fixed, so tokens are ranked by the logit, where DMS evicts those above 0 and
    heads end with different sizes; the gate reads the key and the value in the cache, not the hidden state or a channel
    of the query, so published checkpoints, whose other weights are trained along, cannot be loaded. Gates are not
    trained here: `gates` is a file, of the form that `kvllm.methods.gates` describes.
    """

    gates: str = Field("", description="Path of a file of gates that were trained for the model that is served.")

    def score(self, window: Window) -> Tensor:
        return -self.logits(window)
