"""ChunkKV (arXiv:2502.00299): whole chunks of fixed length stay or go."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from kvllm.methods import register
from kvllm.methods.base import Window
from kvllm.methods.bases import OnBase
from kvllm.options import BaseOptions, Count, strict_dataclass


@register("chunkkv")
@strict_dataclass
class ChunkKV(OnBase):
    """Cut the window into chunks of `chunk_length` tokens and keep those with the best mean score.

    Same: any base score, summed over heads, averaged in fixed chunks, a short last chunk competing as one; one choice
    for all heads of a layer.
    Differs: exactly K tokens stay, so the last chunk to fit is cut to its best tokens, where kvpress keeps whole
    chunks only and so another number. Layers do not share a choice (the paper reuses one for its neighbours).
    """

    base: str = Field("snapkv", description="Method that scores the tokens.")
    base_options: BaseOptions = Field(default_factory=dict)
    chunk_length: Count = Field(20, description="Tokens in a chunk.")

    def score(self, window: Window) -> Tensor:
        """Whole numbers: every token of a better chunk above every token of a worse one."""
        shared = self.scorer.score(window).sum(dim=1)  # [batch, num_tokens]
        return chunk_ranks(shared, self.chunk_length).unsqueeze(1).expand(-1, window.num_kv_heads, -1)


def chunk_ranks(scores: Tensor, chunk_length: int) -> Tensor:
    """Order tokens by their chunk's mean score, then by their own; of equals the earlier is better.

    scores:  [batch, num_tokens]
    returns  [batch, num_tokens] in float32, all different whole numbers
    """
    num_tokens = scores.shape[-1]
    missing = -num_tokens % chunk_length
    chunks = pad(scores, (0, missing)).unflatten(-1, (-1, chunk_length))
    lengths = torch.full(chunks.shape[1:2], chunk_length, device=scores.device)
    lengths[-1] -= missing
    chunk_rank = rank(chunks.sum(dim=-1) / lengths)
    padded = pad(scores, (0, missing), value=-torch.inf).unflatten(-1, (-1, chunk_length))
    token_rank = rank(padded)  # within the chunk
    return -(chunk_rank.unsqueeze(-1) * chunk_length + token_rank).flatten(-2)[..., :num_tokens].float()


def rank(scores: Tensor) -> Tensor:
    """Rank of each entry in the descending order of the last axis, from 0; of equals the earlier comes first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(dim=-1)
