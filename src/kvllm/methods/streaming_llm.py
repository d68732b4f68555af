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
    """Keep the first tokens of the window and its newest ones; looks at no query and no key.

    Keys keep the rotation of their position in the text; the paper numbers them anew inside the cache.
    """

    num_sink_tokens: int = Field(4, ge=0, description="Tokens at the start of the window that are kept.")

    def score(self, window: Window) -> Tensor:
        """The later the higher, the sinks above all."""
        scores = torch.arange(window.num_tokens, dtype=torch.float32, device=window.keys.device)
        scores[: self.num_sink_tokens] = torch.inf
        return scores.expand(window.keys.shape[0], window.num_kv_heads, -1)
