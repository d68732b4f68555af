"""ChunkKV (arXiv:2502.00299): keep or evict whole chunks of fixed length."""

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
    """Keep the chunks of `chunk_length` tokens with the highest mean score.

    Same: the scores of any base method, summed over heads and averaged over fixed chunks (the last may be shorter); all
    heads of a layer keep the same tokens.
    Differs: exactly K tokens are kept, so the last chunk is cut to its best tokens (kvpress keeps whole chunks only).
    Each layer selects on its own (in the paper neighbouring layers share a selection).
    """

    base: str = Field("snapkv", description="Method that scores the tokens.")
    base_options: BaseOptions = Field(default_factory=dict)
    chunk_length: Count = Field(20, description="Tokens in a chunk.")

    def score(self, window: Window) -> Tensor:
        """Integer ranks: every token of a better chunk ranks above every token of a worse one."""
        shared = self.scorer.score(window).sum(dim=1)  # [batch, num_tokens]
        return chunk_ranks(shared, self.chunk_length).unsqueeze(1).expand(-1, window.num_kv_heads, -1)


def chunk_ranks(scores: Tensor, chunk_length: int) -> Tensor:
    """Rank tokens by the mean score of their chunk, then by their own score; ties go to the earlier token.

    scores:  [batch, num_tokens]
    returns  [batch, num_tokens] in float32, distinct integers; higher is better
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
    """Rank of each entry along the last axis in descending order, from 0; ties go to the earlier entry."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(dim=-1)
