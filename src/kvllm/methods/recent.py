"""The newest tokens only: what every scorer has to beat."""

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

    With the prompt protected and, under the budget policy, this is a sliding window behind the prompt (vLLM's R-SWA).
    Under the window policy each window keeps its own last tokens, so the text is thinned evenly instead of cut off.
    """

    def score(self, window: Window) -> Tensor:
        return torch.arange(window.num_tokens, dtype=torch.float32, device=window.keys.device).expand(
            len(window.keys), window.num_kv_heads, -1
        )
