"""What queries see in a window, found without keeping the weight of every query on every key."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvllm.methods.products import by_member


class Attended(NamedTuple):
    """Attention of all queries to all keys of a window.

    sums:     [..., 1, num_tokens], each key's weights, summed over the queries
    outputs:  [..., num_queries, head_dim], what each query gets: its weights times the values
    log_sums: [..., num_queries, 1], logarithm of the sum of each query's exponentials
    """

    sums: Tensor
    outputs: Tensor
    log_sums: Tensor


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Attended:
    """Attend without a mask.

    queries:      [batch, num_kv_heads, num_queries, head_dim], of all heads of a group, scaled: their products with
                  keys are logits
    keys, values: [batch, num_kv_heads, num_tokens, head_dim]
    """
    return Attended(*by_member(_attend, queries, keys, values))


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = queries @ keys.transpose(-1, -2)
    highest = weights.amax(dim=-1, keepdim=True)
    weights.sub_(highest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    sums = total.reciprocal().transpose(-1, -2) @ weights
    return sums, (weights @ values).div_(total), total.log().add_(highest)
