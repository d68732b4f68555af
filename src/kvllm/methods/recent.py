"""Keep the newest tokens: a baseline for every scoring method."""

from __future__ import annotations

import torch
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass


@register("recent")
@strict_dataclass
class Recent(Method):
    """Keep the newest candidates, the same ones for every head and layer.

    Under the budget policy, with a protected prompt, this is a sliding window after the prompt (vLLM's R-SWA). Under
    the window policy, each window keeps its own last tokens, so survivors are spread over the whole text.
    """

    def score(self, window: Window) -> Tensor:
        return torch.arange(window.num_tokens, dtype=torch.float32, device=window.keys.device).expand(
            len(window.keys), window.num_kv_heads, -1
        )
