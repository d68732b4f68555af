"""TRIM-KV (arXiv:2512.03324): a trained gate says how long a token lasts."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from kvllm.methods import register
from kvllm.methods.attention import text_positions
from kvllm.methods.base import Window
from kvllm.methods.gates import Gated
from kvllm.options import strict_dataclass


@register("trimkv")
@strict_dataclass
class TrimKV(Gated):
    """Keep the tokens whose retention, as the gate gave it, has decayed least since they were written.

    Same: a small gate for each layer and KV head gives every token a retention beta in (0, 1); at age a it is worth
    beta ** a, and the lowest are evicted. No query is looked at.
    Differs: the gate reads the key and the value in the cache, not the layer's hidden state, which a method does not
    see, so published gates cannot be loaded; many tokens are evicted at once. Gates are not trained here: `gates` is a
    file, of the form that `kvllm.methods.gates` describes.
    """

    gates: str = Field("", description="Path of a file of gates that were trained for the model that is served.")

    def score(self, window: Window) -> Tensor:
        now = text_positions(window).amax(dim=(-2, -1))  # [batch, num_kv_heads]
        age = now.unsqueeze(-1) - window.positions + 1
        # The logarithm of beta ** age, which for old tokens is no float32 above 0.
        return age * logsigmoid(self.logits(window))
