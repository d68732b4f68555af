"""TRIM-KV (arXiv:2512.03324): a trained gate predicts how long each token should be retained."""

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
    """Keep the tokens whose retention score, predicted by a trained gate, has decayed least with age.

    Same: a small gate for each layer and KV head gives every token a retention beta in (0, 1); its score at age a is
    beta ** a, and the lowest are evicted. No queries are used.
    Differs: the gate reads the cached key and value, not the layer's hidden state, which methods do not see, so
    published gates cannot be loaded; many tokens are evicted at once. KvLLM does not train gates; the file format is
    described in `kvllm.methods.gates`.
    """

    gates: str = Field("", description="Path of a file of gates trained for the served model.")

    def score(self, window: Window) -> Tensor:
        now = text_positions(window).amax(dim=(-2, -1))  # [batch, num_kv_heads]
        age = now.unsqueeze(-1) - window.positions + 1
        # The logarithm, since beta ** age underflows float32 for old tokens.
        return age * logsigmoid(self.logits(window))
