"""Kara (arXiv:2607.01237): bidirectional attention weights, and picked tokens extended to chunks (Token2Chunk)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Kept, Method, Window, top_k
from kvllm.methods.keydiff import KeyDiff
from kvllm.methods.refit import gather_tokens, refit
from kvllm.methods.rope import Rope, Rotation
from kvllm.options import Count, strict_dataclass

GOLDEN = (5**0.5 - 1) / 2
# The published method, without our additions.
PAPER = {
    "bidirectional": True,
    "lookahead": 0,
    "value_norm": False,
    "keydiff_power": 0.0,
    "attention_floor": 0.0,
    "moment": "mean",
    "key_ridge": 0.0,
    "value_ridge": 0.0,
}
# Refitting solves a system of this size at most: it must fit in a GPU multiprocessor's memory, and the few stored
# queries cannot determine a larger one. Windows that keep more tokens are not refitted.
MOST_REFITTED = 128


@register("kara")
@strict_dataclass
class Kara(Method):
    """Keep the tokens with the most attention from all queries of window and buffer, without a causal mask.

    Same: attention weights of every query on every key of the window, also on later ones, averaged over the queries;
    tokens between two picks are kept too, in chunks of at most `max_chunk_size` (Token2Chunk).
    Differs: queries are thinned by `query_stride`. The paper's rule for filling chunks was not available to us; here a
    filler competes with `chunk_fill` times the lower score of its two picks. These are not the paper's: `lookahead`
    rotates queries ahead, `attention_floor` is added to the weights, `value_norm` and `keydiff_power` multiply them,
    `key_ridge` and `value_ridge` refit the survivors; `variant` "paper" turns them off.
    """

    bidirectional: bool = Field(
        True, description="False applies the causal mask (ablation): each query scores only keys up to its position."
    )
    lookahead: int = Field(
        300,
        ge=0,
        description="Rotate each query (RoPE) to a position up to this many tokens after the newest, where future "
        "queries will be, so that no key is scored from before it or from too close (ours); 0 = off. No effect without "
        "RoPE or with a causal mask.",
    )
    value_norm: bool = Field(True, description="Multiply a key's attention by the norm of its value.")
    keydiff_power: float = Field(
        2.0,
        ge=0,
        le=16,
        description="Also multiply it by (1 - cosine of the key to the window's mean key) to this power (KeyDiff), so "
        "that few of many similar keys are kept; 0 = off.",
    )
    attention_floor: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Constant added to every key's attention, in units of the mean attention per key, so that keys "
        "without attention so far are ranked by their value and key (ours).",
    )
    max_chunk_size: Count = Field(
        8, description="Longest chunk that Token2Chunk fills, including the two picks at its ends; 1 or 2 = off."
    )
    # Below 1: at 1, a filler could evict the pick that it was added for.
    chunk_fill: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Score of a token that fills a chunk, as a share of the lower score of its two picks; 0 turns "
        "Token2Chunk off.",
    )
    moment: Literal["mean", "rms", "max"] = Field(
        "mean",
        description="How a key's attention weights are aggregated: mean, root mean square, or maximum over the queries "
        "(then the mean over the heads of a query group).",
    )
    key_ridge: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Ridge penalty for refitting keys: shifts the kept keys to recover the attention of the evicted "
        f"ones; smaller = stronger, 0 = off. No effect if more than {MOST_REFITTED} tokens are kept at once.",
    )
    value_ridge: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Ridge penalty for refitting values: adjusts the kept values to approximate the attention output "
        f"of the full window; smaller = stronger, 0 = off. No effect if more than {MOST_REFITTED} tokens are kept at "
        "once.",
    )
    variant: Literal["tuned", "paper"] = Field(
        "tuned",
        description='"paper" = the method as published; overrides all options above except max_chunk_size and '
        "chunk_fill.",
    )

    def __post_init__(self) -> None:
        if self.variant == "paper":
            for name, value in PAPER.items():
                object.__setattr__(self, name, value)

    @property
    def fused(self) -> bool:
        """Whether Triton kernels support these options."""
        return self.bidirectional and self.moment == "mean"

    @property
    def uses_rope(self) -> bool:
        return self.bidirectional and self.lookahead > 0

    def refits(self, num_kept: int) -> bool:
        """Whether keys or values are refitted when `num_kept` tokens survive."""
        return (self.key_ridge > 0 or self.value_ridge > 0) and num_kept <= MOST_REFITTED

    def score(self, window: Window) -> Tensor:
        return self._score(self.ahead(window))

    def _score(self, window: Window) -> Tensor:
        scores = attention_moment(window, self.moment, self.bidirectional)
        scores = scores + self.attention_floor / window.num_tokens
        if self.value_norm:
            scores = scores * window.head_values.norm(dim=-1)
        if self.keydiff_power > 0:
            scores = scores * (1 + KeyDiff().score(window)).clamp(min=0) ** self.keydiff_power
        return scores

    def ahead(self, window: Window) -> Window:
        """The window with its queries rotated to future positions (`lookahead`)."""
        if not self.uses_rope or window.rope is None:
            return window
        queries = window.queries.float().unflatten(2, (window.num_kv_heads, -1))
        rotation = self.rotation(window.rope, window.query_positions, window.query_shifts, window.keys.shape[-1])
        return replace(window, queries=rotation.apply(queries).flatten(2, 3))

    def rotation(
        self,
        rope: Rope,
        query_positions: Tensor,
        query_shifts: Tensor | None,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
    ) -> Rotation:
        """The rotation of queries to future positions; angles broadcast to [num_queries, num_kv_heads, group_size].

        dtype: of the sines and cosines
        """
        distances = ahead_distances(query_positions, query_shifts, self.lookahead)
        return rope.rotation(distances.unsqueeze(1), head_dim, dtype)

    def select(self, scores: Tensor, num_kept: int) -> Tensor:
        return token2chunk(scores, num_kept, self.max_chunk_size, self.chunk_fill)

    def compress(self, window: Window, num_kept: int) -> Kept:
        window = self.ahead(window)
        kept = self.select(self._score(window), num_kept)
        if not self.refits(num_kept):
            return Kept(kept)
        keys, values = gather_tokens(window.head_keys, kept), gather_tokens(window.head_values, kept)
        keys, values = refit(window.scaled_queries, keys, values, window.attended, self.key_ridge, self.value_ridge)
        return Kept(kept, keys.transpose(1, 2).to(window.keys.dtype), values.transpose(1, 2).to(window.values.dtype))


def ahead_distances(query_positions: Tensor, query_shifts: Tensor | None, lookahead: int) -> Tensor:
    """[num_queries, group_size]: number of tokens by which to move each query forward.

    Queries move to positions 1 to `lookahead` tokens after the newest one. From the oldest query to the newest, these
    advance by the golden ratio modulo that range, which spaces any number of queries evenly.
    """
    age = (query_positions < query_positions[:, None]).sum(dim=1).double()  # 0 is the oldest
    ahead = 1 + ((age * GOLDEN) % 1 * lookahead).floor()
    shifts = torch.zeros_like(query_positions[:1]) if query_shifts is None else query_shifts
    return (query_positions.max() - query_positions + ahead)[:, None] + shifts


def attention_moment(window: Window, moment: str, bidirectional: bool = True) -> Tensor:
    """[batch, num_kv_heads, num_tokens]: each key's attention weights, aggregated over queries and heads of its group.

    With a causal mask (`bidirectional` False), the mean is over the queries at or after the key only: otherwise older
    keys would score higher because more queries attend to them. A key before which all queries lie gets 0.
    """
    judges: Tensor | int = window.scaled_queries.shape[2]
    if bidirectional and moment == "mean":
        return window.attended.sums.squeeze(2) / judges
    if bidirectional:
        weights = window.weights
    else:
        indices = torch.arange(window.num_tokens, device=window.keys.device)
        sees = indices <= window.head_query_positions.unsqueeze(-1)  # [group_size, num_queries, num_tokens]
        # A finite minimum, not -inf: a fully masked row would be NaN.
        logits = window.logits().masked_fill(~sees, torch.finfo(torch.float32).min)
        weights = logits.softmax(dim=-1).masked_fill(~sees, 0.0)
        judges = sees.sum(dim=(0, 1)).clamp(min=1)
    if moment == "mean":
        return weights.sum(dim=(2, 3)) / judges
    if moment == "rms":
        return (weights.square().sum(dim=(2, 3)) / judges).sqrt()
    return weights.amax(dim=3).mean(dim=2)


def token2chunk(scores: Tensor, num_kept: int, max_chunk_size: int, chunk_fill: float) -> Tensor:
    """Select the best tokens, then fill gaps between neighbouring ones in exchange for the weakest.

    1. The `num_kept` best tokens are the picks.
    2. If two neighbouring picks span at most `max_chunk_size` tokens, both included, the tokens between them (fillers)
       get `chunk_fill` times the lower score of the two.
    3. The `num_kept` best of picks and fillers are kept; ties go to picks, then to the earlier token.

    A filler's score is at most that of its two picks and it loses ties, so it is never kept without them. Its original
    score does not matter: it is at most the weakest pick's.

    scores:  [batch, num_kv_heads, num_tokens], none negative
    returns  [batch, num_kv_heads, num_kept], ascending (int64)
    """
    picks = top_k(scores, num_kept)
    if max_chunk_size <= 2 or chunk_fill == 0:
        return picks
    num_tokens = scores.shape[-1]
    indices = torch.arange(num_tokens, device=scores.device).expand(scores.shape)
    is_pick = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, picks, True)
    left = torch.where(is_pick, indices, -1).cummax(dim=-1).values  # the nearest pick at or before each token
    right = torch.where(is_pick, indices, num_tokens).flip(-1).cummin(dim=-1).values.flip(-1)
    fillable = ~is_pick & (left >= 0) & (right < num_tokens) & (right - left < max_chunk_size)
    weaker = torch.minimum(scores.gather(-1, left.clamp(min=0)), scores.gather(-1, right.clamp(max=num_tokens - 1)))
    fill = torch.where(fillable, chunk_fill * weaker, -torch.inf)
    # Picks come first in the row, so the stable sort of top_k resolves ties in their favour.
    rivals = torch.cat([scores.gather(-1, picks), fill], dim=-1)
    tokens = torch.cat([picks, indices], dim=-1)
    return tokens.gather(-1, top_k(rivals, num_kept)).sort(dim=-1).values
