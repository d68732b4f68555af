"""StreamingLLM (arXiv:2309.17453): the first tokens and the newest ones."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass


@register("streaming_llm")
@strict_dataclass
class StreamingLLM(Method):
    """Keep the first tokens of the window and its newest ones; uses no queries or keys.

    Keys keep the rotation of their text position; the paper rotates them by their index in the cache.
    """

    num_sink_tokens: int = Field(4, ge=0, description="Number of tokens to keep at the start of the window.")

    def score(self, window: Window) -> Tensor:
        """Later tokens score higher; sinks score highest."""
        scores = torch.arange(window.num_tokens, dtype=torch.float32, device=window.keys.device)
        scores[: self.num_sink_tokens] = torch.inf
        return scores.expand(window.keys.shape[0], window.num_kv_heads, -1)
