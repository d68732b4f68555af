"""Kara (arXiv:2607.01237): bidirectional attention weights, and picks that grow into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Method, Window, top_k


@register("kara")
@dataclass(frozen=True)
class Kara(Method):
    """Keep what the window's and the buffer's queries look at, those before a key included.

    bidirectional:  False is the causal ablation: a query sees only the keys up to its own place
    value_norm:     weight a key's attention by the length of the value that it brings
    max_chunk_size: longest chunk, its two picks included, that Token2Chunk fills; 1 or 2 fill nothing
    chunk_fill:     a filler is worth this share of the weaker of its two picks
    """

    bidirectional: bool = True
    value_norm: bool = True
    max_chunk_size: int = 8
    chunk_fill: float = 0.5

    def __post_init__(self) -> None:
        if self.max_chunk_size < 1:
            raise ValueError(f"max_chunk_size={self.max_chunk_size}: must be positive; 1 turns Token2Chunk off.")
        if not 0 <= self.chunk_fill < 1:
            # At 1 a filler could push out the very pick that it was filled for.
            raise ValueError(f"chunk_fill={self.chunk_fill}: a share in [0, 1); 0 turns Token2Chunk off.")

    def score(self, window: Window) -> Tensor:
        weights = bidirectional_weights(window) if self.bidirectional else causal_weights(window)
        if not self.value_norm:
            return weights
        return weights * window.values.float().norm(dim=-1).transpose(1, 2)

    def select(self, scores: Tensor, num_kept: int) -> Tensor:
        return token2chunk(scores, num_kept, self.max_chunk_size, self.chunk_fill)


def bidirectional_weights(window: Window) -> Tensor:
    """[batch, num_kv_heads, num_tokens]: mean attention over the queries and the heads of a group; no mask."""
    return window.logits().softmax(dim=-1).mean(dim=(2, 3))


def causal_weights(window: Window) -> Tensor:
    """[batch, num_kv_heads, num_tokens]: the same, a key judged only by the queries at and after it.

    The mean is over the queries that see the key; over all of them, old keys would win by being seen more often.
    A key that no query sees gets 0.
    """
    places = torch.arange(window.num_tokens, device=window.keys.device)
    sees = places <= window.query_positions[:, None]  # [num_queries, num_tokens]
    # A finite floor, not -inf: a query that sees nothing then has weights to mask, and not NaN.
    weights = window.logits().masked_fill(~sees, torch.finfo(torch.float32).min).softmax(dim=-1)
    weights = weights.masked_fill(~sees, 0.0).mean(dim=2).sum(dim=2)
    return weights / sees.sum(dim=0).clamp(min=1)


def token2chunk(scores: Tensor, num_kept: int, max_chunk_size: int, chunk_fill: float) -> Tensor:
    """The best tokens, with the gaps between near ones filled at the cost of the weakest.

    1. The `num_kept` best tokens are the picks.
    2. Where two neighbouring picks span at most `max_chunk_size` tokens, themselves included, those between them
       are worth `chunk_fill` times the weaker of the two.
    3. Of picks and fillers the `num_kept` best stay; of equals picks before fillers, then the earlier.

    A filler is worth less than its two picks, or as much and then loses the tie, so it never outlives them. Its own
    score does not matter: it is no more than the weakest pick's, so alone it would not have stayed.

    scores:  [batch, num_kv_heads, num_tokens], none negative
    returns  [batch, num_kv_heads, num_kept], ascending (int64)
    """
    picks = top_k(scores, num_kept)
    if max_chunk_size <= 2 or chunk_fill == 0:
        return picks
    num_tokens = scores.shape[-1]
    places = torch.arange(num_tokens, device=scores.device).expand(scores.shape)
    is_pick = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, picks, True)
    left = torch.where(is_pick, places, -1).cummax(dim=-1).values  # the nearest pick at or before each token
    right = torch.where(is_pick, places, num_tokens).flip(-1).cummin(dim=-1).values.flip(-1)
    fillable = ~is_pick & (left >= 0) & (right < num_tokens) & (right - left < max_chunk_size)
    weaker = torch.minimum(scores.gather(-1, left.clamp(min=0)), scores.gather(-1, right.clamp(max=num_tokens - 1)))
    fill = torch.where(fillable, chunk_fill * weaker, -torch.inf)
    # Picks come first in the row, so the stable order of top_k settles ties in their favour.
    rivals = torch.cat([scores.gather(-1, picks), fill], dim=-1)
    tokens = torch.cat([picks, places], dim=-1)
    return tokens.gather(-1, top_k(rivals, num_kept)).sort(dim=-1).values
