"""Expected Attention (arXiv:2510.00636): the expected attention of future queries."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.attention import text_positions
from kvllm.methods.base import Method, Window
from kvllm.methods.rope import Rope, check_plain, frequencies
from kvllm.options import Count, RopeTheta, Share, strict_dataclass


@register("expected_attention")
@strict_dataclass
class ExpectedAttention(Method):
    """Keep the keys with the largest expected exp(q.k / sqrt(d)) for normally distributed queries.

    Same: softmax of k.mu / sqrt(d) + k'Sk / (2 d), mean over the group, times the norm of the value. The exponent is
    the mean of a key's logits plus half their variance, so mu and S are never materialised.
    Differs: mu and S are estimated from the stored queries, not from the whole prompt's. The four sinks that the paper
    keeps are in the protected prompt. By default the stored queries are used as they are, after RoPE, as if future
    queries had the rotations of the newest ones. With `rope_theta` their rotation is undone and replaced by the average
    over the next `num_future_tokens` positions, as in the paper (plain RoPE only, no scaling).
    """

    rope_theta: RopeTheta = None
    num_future_tokens: Count = Field(
        512, description="Number of future positions to average the rotation over; needs `rope_theta`."
    )
    use_covariance: bool = Field(True, description="Use the variance of the queries as well as their mean.")
    use_value_norm: bool = Field(True, description="Weight each key by the norm of its value.")
    epsilon: Share = Field(
        0.0, description="Added to the expected weight before multiplying by the value norm (kvpress: 0, AMS: 0.01)."
    )

    @property
    def uses_rope(self) -> bool:
        return self.rope_theta is not None

    def check_rope(self, rope: Rope | None) -> None:
        if self.rope_theta is not None:
            check_plain(rope, self.rope_theta)

    def score(self, window: Window) -> Tensor:
        queries = window.grouped_queries()
        if self.rope_theta is not None:
            queries = future_queries(queries, text_positions(window), self.rope_theta, self.num_future_tokens)
        scale = queries.shape[-1] ** -0.5
        logits = torch.einsum("bhgqd,bthd->bhgqt", queries, window.keys.float()) * scale
        exponent = logits.mean(dim=3)
        if self.use_covariance:
            exponent = exponent + logits.var(dim=3, correction=0) / 2
        weights = exponent.softmax(dim=-1).mean(dim=2)
        if not self.use_value_norm:
            return weights
        return (weights + self.epsilon) * window.values.float().norm(dim=-1).transpose(1, 2)


def future_queries(queries: Tensor, positions: Tensor, rope_theta: float, num_future_tokens: int) -> Tensor:
    """Rotate queries from their own positions to the average rotation of the `num_future_tokens` after the newest.

    queries:   [batch, num_kv_heads, group_size, num_queries, head_dim], after RoPE
    positions: [batch, num_kv_heads, group_size, num_queries]
    returns    the same shape as queries
    """
    head_dim = queries.shape[-1]
    rope = Rope(frequencies(rope_theta, head_dim, queries.device))
    to_newest = rope.rotation(positions.amax(dim=(-2, -1), keepdim=True) - positions, head_dim)
    ahead = rope.rotation(torch.arange(1, num_future_tokens + 1, device=queries.device), head_dim, torch.float64)
    # An average of rotations also shrinks vectors.
    ahead = replace(ahead, cos=ahead.cos.mean(dim=0), sin=ahead.sin.mean(dim=0))
    return ahead.apply(to_newest.apply(queries))
