"""Kara (arXiv:2607.01237): bidirectional attention weights, and picks that grow into chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Kept, Method, Window, top_k
from kvllm.methods.keydiff import KeyDiff
from kvllm.methods.refit import gather_tokens, refit_values, shift_keys
from kvllm.methods.rope import Rope, Rotation
from kvllm.options import Count, strict_dataclass

GOLDEN = (5**0.5 - 1) / 2
# What is published of the method, and nothing of ours.
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
# Survivors that are fitted at once: their matrix fits a GPU's multiprocessor, and the few stored queries can tell them
# apart. Of more than that enough stay as they are.
MOST_REFITTED = 128


@register("kara")
@strict_dataclass
class Kara(Method):
    """Keep what the window's and the buffer's queries look at, those before a key included."""

    bidirectional: bool = Field(
        True, description="False is the causal ablation: a query judges only the keys up to its own position."
    )
    lookahead: int = Field(
        300,
        ge=0,
        description="RoPE rotates each query to a position up to this many tokens after the newest, where future "
        "queries will be; 0 = none. So no key is judged from before it, nor from too near (ours). Without RoPE, and in "
        "the causal ablation, nothing is rotated.",
    )
    value_norm: bool = Field(True, description="Weight a key's attention by the norm of its value.")
    keydiff_power: float = Field(
        2.0,
        ge=0,
        le=16,
        description="Weight it too by this power of 1 - cosine of the key to the mean key of the window (KeyDiff), "
        "since of many similar keys a few will do; 0 = none.",
    )
    attention_floor: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="What every key gets beside its attention, in units of the mean attention of a key. What no query "
        "has looked at yet, and one may ask for later, is then judged by its value and its key (ours).",
    )
    max_chunk_size: Count = Field(
        8, description="Longest chunk, its two picks included, that Token2Chunk fills; 1 or 2 fill nothing."
    )
    # Below 1: there a filler could push out the very pick that it was filled for.
    chunk_fill: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="A token that fills a chunk is worth this share of the weaker of its two picks; 0 turns "
        "Token2Chunk off.",
    )
    moment: Literal["mean", "rms", "max"] = Field(
        "mean",
        description="How the weights that a key gets are summed up: their mean, root mean square, or the maximum over "
        "the queries (mean over the heads of a query group).",
    )
    key_ridge: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Shift the kept keys so that they win back the evicted ones' attention; the smaller the stronger, "
        f"0 = off. Only where at most {MOST_REFITTED} tokens are kept at once.",
    )
    value_ridge: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Change the kept values so that they approximate the output of the whole window; the smaller the "
        f"stronger, 0 = off. Only where at most {MOST_REFITTED} tokens are kept at once.",
    )
    variant: Literal["tuned", "paper"] = Field(
        "tuned",
        description='"paper" sets the plain form of the paper, whatever the options above it say.',
    )

    def __post_init__(self) -> None:
        if self.variant == "paper":
            for name, value in PAPER.items():
                object.__setattr__(self, name, value)

    @property
    def fused(self) -> bool:
        """Whether there are Triton kernels for this."""
        return self.bidirectional and self.moment == "mean"

    @property
    def uses_rope(self) -> bool:
        return self.bidirectional and self.lookahead > 0

    def refits(self, num_kept: int) -> bool:
        """Whether so many survivors are fitted."""
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
        """The window with its queries rotated to where those to come will stand."""
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
        """The rotation of queries ahead, of distances [num_queries, 1, group_size]; dtype: of the sines and cosines."""
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
        if self.key_ridge > 0:
            keys = keys + shift_keys(window, kept, self.key_ridge)
        if self.value_ridge > 0:
            values = refit_values(window, kept, self.value_ridge)
        return Kept(kept, keys.transpose(1, 2).to(window.keys.dtype), values.transpose(1, 2).to(window.values.dtype))


def ahead_distances(query_positions: Tensor, query_shifts: Tensor | None, lookahead: int) -> Tensor:
    """[num_queries, group_size], tokens from where each query stands to where it is taken to stand.

    That is 1 to `lookahead` tokens after the newest one: from the oldest query to the newest in steps of the golden
    ratio around that range, which spread any number of them evenly.
    """
    age = (query_positions < query_positions[:, None]).sum(dim=1).double()  # 0 is the oldest
    ahead = 1 + ((age * GOLDEN) % 1 * lookahead).floor()
    shifts = torch.zeros_like(query_positions[:1]) if query_shifts is None else query_shifts
    return (query_positions.max() - query_positions + ahead)[:, None] + shifts


def attention_moment(window: Window, moment: str, bidirectional: bool = True) -> Tensor:
    """[batch, num_kv_heads, num_tokens]: what a key gets of the queries' attention, none of them masked.

    In the causal ablation a key is judged only by the queries at and after it, and by these alone: over all of them
    old keys would win by being seen more often. A key that no query sees gets 0.
    """
    judges: Tensor | int = window.logits().shape[2] * window.logits().shape[3]
    if bidirectional:
        weights = window.weights
    else:
        indices = torch.arange(window.num_tokens, device=window.keys.device)
        sees = indices <= window.head_query_positions.unsqueeze(-1)  # [group_size, num_queries, num_tokens]
        # A finite floor, not -inf: a query that sees nothing then has weights to mask, and not NaN.
        logits = window.logits().masked_fill(~sees, torch.finfo(torch.float32).min)
        weights = logits.softmax(dim=-1).masked_fill(~sees, 0.0)
        judges = sees.sum(dim=(0, 1)).clamp(min=1)
    if moment == "mean":
        return weights.sum(dim=(2, 3)) / judges
    if moment == "rms":
        return (weights.square().sum(dim=(2, 3)) / judges).sqrt()
    return weights.amax(dim=3).mean(dim=2)


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
    indices = torch.arange(num_tokens, device=scores.device).expand(scores.shape)
    is_pick = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, picks, True)
    left = torch.where(is_pick, indices, -1).cummax(dim=-1).values  # the nearest pick at or before each token
    right = torch.where(is_pick, indices, num_tokens).flip(-1).cummin(dim=-1).values.flip(-1)
    fillable = ~is_pick & (left >= 0) & (right < num_tokens) & (right - left < max_chunk_size)
    weaker = torch.minimum(scores.gather(-1, left.clamp(min=0)), scores.gather(-1, right.clamp(max=num_tokens - 1)))
    fill = torch.where(fillable, chunk_fill * weaker, -torch.inf)
    # Picks come first in the row, so the stable order of top_k settles ties in their favour.
    rivals = torch.cat([scores.gather(-1, picks), fill], dim=-1)
    tokens = torch.cat([picks, indices], dim=-1)
    return tokens.gather(-1, top_k(rivals, num_kept)).sort(dim=-1).values
