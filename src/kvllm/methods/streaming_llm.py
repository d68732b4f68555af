"""StreamingLLM (arXiv:2309.17453): the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Method, Window


@register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep the first tokens of the window and its newest ones; looks at no query and no key.

    Keys keep the rotation of their place in the text; the paper numbers them anew inside the cache.
    """

    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens={self.num_sink_tokens}: must be 0 or more.")

    def score(self, window: Window) -> Tensor:
        """The later the higher, the sinks above all."""
        scores = torch.arange(window.num_tokens, dtype=torch.float32, device=window.keys.device)
        scores[: self.num_sink_tokens] = torch.inf
        return scores.expand(window.keys.shape[0], window.num_kv_heads, -1)
