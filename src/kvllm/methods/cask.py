"""CASK (arXiv:2604.10900): cut the prompt to its budget, protect a core of tokens, merge the scratch around it."""

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
    """Keep K / 2 core tokens unchanged and merge neighbours among the rest until K entries are left.

    Same: core and scratch; a run of merged scratch tokens never crosses a core token; merges first join neighbours
    with a gap of at most `max_gap` and a cosine of at least `min_similarity`, then those with such a gap, then any,
    each in order of similarity; an entry has the key and position of its highest-scoring token and the mean of the
    values, weighted by softplus(score) + 1e-4, with scores normalised to mean 0 and variance 1; logits are not
    corrected for the number of merged tokens.
    Differs:
    - Each layer and KV head makes its own plan, so its core holds its own best tokens (CASK: sampled heads vote on one
      plan).
    - Similarities are computed once and all merges happen in one step, so a long run can join tokens of which only
      neighbours are similar (CASK merges pair by pair and compares the merged keys again).
    - `base` can be any method, kara by default (CASK scores with TriAttention, which needs calibration).
    - Keys are compared after RoPE; with `rope_theta`, before it, as in CASK.
    - Methods do not see the text, so phase markers do not end runs. An entry that is merged again (budget policy)
      counts as one token.
    - The weights of the values sum to 1 (CASK's code divides by max(1, their sum)).

    The prompt stage runs if `KvConfig.prompt_budget` is set.
    Same: it evicts and never merges; a few evenly spaced tokens are kept for coverage, the best others fill the budget.
    Differs: each layer and KV head selects on its own, as above; the prompt is cut together with the first window,
    whose queries score it (CASK cuts at the end of prefill, with calibrated scores that need no queries); the budget
    is a separate setting (CASK shares one between prompt and answer).
    """

    base: str = Field("kara", description="Method that scores the tokens.")
    base_options: BaseOptions = Field(default_factory=dict)
    # At most 0.5: with a larger core, too few neighbours could be merged to get down to K entries.
    core_share: float = Field(0.5, ge=0, le=0.5, description="Share of the kept tokens that are core, never merged.")
    anchor_share: float = Field(
        0.0625, ge=0, le=0.5, description="Share of the prompt budget spent on evenly spaced tokens, for coverage."
    )
    max_gap: Count = Field(32, description="Neighbours at most this many tokens apart are merged first.")
    min_similarity: Cosine = Field(0.985, description="Neighbours with at least this cosine of keys are merged first.")
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
        # Each core token blocks its two links, so at most (K - 1) / 2 of them leave the num_tokens - K links to merge.
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
        """[batch, num_kv_heads, num_tokens]: index of the run that each token is merged into, 0 to num_kept - 1."""
        keys = window.keys.float().transpose(1, 2)
        if self.rope_theta is not None:
            keys = unrotate(keys, window.positions, self.rope_theta)
        similarity = cosine_similarity(keys[..., :-1, :], keys[..., 1:, :], dim=-1)  # of each link: num_tokens - 1
        near = window.positions.diff(dim=-1) <= self.max_gap
        alike = near & (similarity >= self.min_similarity)
        tier = near.float() + alike.float()  # cosines span 2, so tiers 3 apart do not overlap
        links = torch.where(core[..., :-1] | core[..., 1:], -torch.inf, 3 * tier + similarity)
        merged = torch.zeros_like(core).scatter(-1, top_k(links, window.num_tokens - num_kept) + 1, True)
        return (~merged).cumsum(dim=-1) - 1


def best_of_each(entry: Tensor, scores: Tensor, num_entries: int) -> Tensor:
    """[batch, num_kv_heads, num_entries]: index of the best token of each run; ties go to the earlier one."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    by_entry = order.gather(-1, entry.gather(-1, order).sort(dim=-1, stable=True).indices)
    return by_entry.gather(-1, run_starts(entry, num_entries))


def merged_values(values: Tensor, scores: Tensor, entry: Tensor, best: Tensor) -> Tensor:
    """The weighted mean of the values in each run; runs of one token keep their value unchanged.

    values:        [batch, num_tokens, num_kv_heads, head_dim]
    scores, entry: [batch, num_kv_heads, num_tokens];  best: [batch, num_kv_heads, num_kept]
    returns        [batch, num_kept, num_kv_heads, head_dim]
    """
    starts = run_starts(entry, best.shape[-1])
    ends = torch.cat([starts[..., 1:], torch.full_like(starts[..., :1], entry.shape[-1])], dim=-1)
    # float64: sums of runs are differences of cumulative sums.
    weights = softplus(scores.double()) + 1e-4
    totals = run_sums(weights.unsqueeze(-1), starts, ends)
    means = run_sums(weights.unsqueeze(-1) * values.transpose(1, 2).double(), starts, ends) / totals
    alone = (ends - starts == 1).unsqueeze(-1).transpose(1, 2)
    return torch.where(alone, take_rows(values, best), means.to(values.dtype).transpose(1, 2))


def run_starts(entry: Tensor, num_entries: int) -> Tensor:
    """[batch, num_kv_heads, num_entries]: index of the first token of each run."""
    wanted = torch.arange(num_entries, device=entry.device).expand(*entry.shape[:-1], -1)
    return torch.searchsorted(entry, wanted.contiguous())


def run_sums(x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """[batch, num_kv_heads, num_entries, n]: sums of x [batch, num_kv_heads, num_tokens, n] over [start, end)."""
    total = pad(x.cumsum(dim=2), (0, 0, 1, 0))
    at_start, at_end = (i.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]) for i in (starts, ends))
    return total.gather(2, at_end) - total.gather(2, at_start)


def normalise(scores: Tensor) -> Tensor:
    """Scores of each head, normalised to mean 0 and variance 1."""
    scores = scores - scores.mean(dim=-1, keepdim=True)
    return scores / scores.std(dim=-1, keepdim=True, correction=0).clamp(min=1e-12)
