"""CASK (arXiv:2604.10900): a prompt cut to its budget, then a protected core, and scratch merged around it."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad, softplus

from kvllm.methods import register
from kvllm.methods.base import Kept, Window, take_rows, top_k
from kvllm.methods.bases import OnBase
from kvllm.methods.rope import Rope, check_plain, unrotate
from kvllm.options import BaseOptions, Cosine, Count, RopeTheta, strict_dataclass


@register("cask")
@strict_dataclass
class CASK(OnBase):
    """Keep the best half of K as they are; merge neighbours among the rest until K entries are left.

    Same: core and scratch; runs of scratch never cross a core token; merges prefer a gap of at most `max_gap` and a
    cosine of at least `min_similarity`, then the gap alone, then any, by similarity; the entry has the key and position
    of its best source and the mean value of all, weighted by softplus(score) + 1e-4, score normalised to mean 0 and
    variance 1; no correction of the logit for the number of sources.
    Differs:
    - Each layer and KV head plans for itself (CASK: one plan by vote of sampled heads), so its core is its own best.
    - The similarity of neighbours is taken once, so all merges happen in one step; CASK merges pair by pair and
      compares the merged keys again. A run can thus chain tokens of which only neighbours are alike.
    - CASK scores with TriAttention, which needs calibration: `base` names any method, kara by default.
    - Keys are compared after RoPE, and before it (as in CASK) where `rope_theta` is given.
    - A window holds no text, so phase markers do not cut runs; an entry merged again (budget policy) counts as one.
    - The values' weights are a true mean; CASK's code divides by max(1, their sum).

    The prompt stage runs where `KvConfig.prompt_budget` is set.
    Same: it evicts and merges nothing; a few tokens at even distances stay for coverage, the best fill the budget.
    Differs: each layer and KV head chooses for itself, as above; the cut waits for the first window, whose queries
    judge the prompt (CASK cuts at the end of prefill, with calibrated scores that need no queries); the budget is a
    setting of its own (CASK: what the newest tokens leave of one budget for prompt and answer).
    """

    base: str = Field("kara", description="Method that scores the tokens.")
    base_options: BaseOptions = Field(default_factory=dict)
    # At most half of K: any such core leaves enough mergeable neighbours to reach K.
    core_share: float = Field(0.5, ge=0, le=0.5, description="Share of the kept tokens that are core, never merged.")
    anchor_share: float = Field(
        0.0625, ge=0, le=0.5, description="Share of the prompt's budget that is kept at even distances, for coverage."
    )
    max_gap: Count = Field(32, description="Distance in tokens up to which neighbours are merged first.")
    min_similarity: Cosine = Field(0.985, description="Cosine of two keys from which on neighbours are merged first.")
    rope_theta: RopeTheta = None

    @property
    def uses_rope(self) -> bool:
        return self.rope_theta is not None or super().uses_rope

    def check_rope(self, rope: Rope | None) -> None:
        if self.rope_theta is not None:
            check_plain(rope, self.rope_theta)
        super().check_rope(rope)

    def score(self, window: Window) -> Tensor:
        return self.scorer.score(window)

    def compress(self, window: Window, num_kept: int) -> Kept:
        scores = normalise(self.score(window))
        # A core token bars the two links beside it, so (K - 1) / 2 of them leave the num_tokens - K merges needed.
        num_core = min(round(self.core_share * num_kept), (num_kept - 1) // 2)
        core = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top_k(scores, num_core), True)
        entry = self.entries(window, core, num_kept)
        best = best_of_each(entry, scores, num_kept)
        return Kept(best, take_rows(window.keys, best), merged_values(window.values, scores, entry, best))

    def compress_prompt(self, window: Window, num_kept: int) -> Kept:
        num_anchors = round(self.anchor_share * num_kept)
        anchors = torch.arange(num_anchors, device=window.keys.device) * window.num_tokens // max(num_anchors, 1)
        return Kept(top_k(self.score(window).index_fill(-1, anchors, torch.inf), num_kept))

    def entries(self, window: Window, core: Tensor, num_kept: int) -> Tensor:
        """[batch, num_kv_heads, num_tokens], from 0 to num_kept - 1: the run of neighbours that each token is in."""
        keys = window.keys.float().transpose(1, 2)
        if self.rope_theta is not None:
            keys = unrotate(keys, window.positions, self.rope_theta)
        similarity = cosine_similarity(keys[..., :-1, :], keys[..., 1:, :], dim=-1)  # one link less than tokens
        near = window.positions.diff(dim=-1) <= self.max_gap
        alike = near & (similarity >= self.min_similarity)
        tier = near.float() + alike.float()  # a cosine spans 2, so tiers that are 3 apart never mix
        links = torch.where(core[..., :-1] | core[..., 1:], -torch.inf, 3 * tier + similarity)
        merged = torch.zeros_like(core).scatter(-1, top_k(links, window.num_tokens - num_kept) + 1, True)
        return (~merged).cumsum(dim=-1) - 1


def best_of_each(entry: Tensor, scores: Tensor, num_entries: int) -> Tensor:
    """[batch, num_kv_heads, num_entries]: the best token of each run, of equals the earlier one."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    by_entry = order.gather(-1, entry.gather(-1, order).sort(dim=-1, stable=True).indices)
    return by_entry.gather(-1, run_starts(entry, num_entries))


def merged_values(values: Tensor, scores: Tensor, entry: Tensor, best: Tensor) -> Tensor:
    """The weighted mean of each run's values, and the value itself where a run is one token.

    values:        [batch, num_tokens, num_kv_heads, head_dim]
    scores, entry: [batch, num_kv_heads, num_tokens];  best: [batch, num_kv_heads, num_kept]
    returns        [batch, num_kept, num_kv_heads, head_dim]
    """
    starts = run_starts(entry, best.shape[-1])
    ends = torch.cat([starts[..., 1:], torch.full_like(starts[..., :1], entry.shape[-1])], dim=-1)
    # float64: the sum of a run is the difference of two running sums.
    weights = softplus(scores.double()) + 1e-4
    totals = run_sums(weights.unsqueeze(-1), starts, ends)
    means = run_sums(weights.unsqueeze(-1) * values.transpose(1, 2).double(), starts, ends) / totals
    alone = (ends - starts == 1).unsqueeze(-1).transpose(1, 2)
    return torch.where(alone, take_rows(values, best), means.to(values.dtype).transpose(1, 2))


def run_starts(entry: Tensor, num_entries: int) -> Tensor:
    """[batch, num_kv_heads, num_entries]: the first token of each run."""
    wanted = torch.arange(num_entries, device=entry.device).expand(*entry.shape[:-1], -1)
    return torch.searchsorted(entry, wanted.contiguous())


def run_sums(x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """[batch, num_kv_heads, num_entries, n]: sums of x [batch, num_kv_heads, num_tokens, n] over [start, end)."""
    total = pad(x.cumsum(dim=2), (0, 0, 1, 0))
    at_start, at_end = (i.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]) for i in (starts, ends))
    return total.gather(2, at_end) - total.gather(2, at_start)


def normalise(scores: Tensor) -> Tensor:
    """Each head's scores at mean 0 and variance 1."""
    scores = scores - scores.mean(dim=-1, keepdim=True)
    return scores / scores.std(dim=-1, keepdim=True, correction=0).clamp(min=1e-12)
