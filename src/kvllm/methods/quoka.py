"""QuoKA (arXiv:2602.08722): keys closest to the most atypical queries."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.options import Count, strict_dataclass


@register("quoka")
@strict_dataclass
class QuoKA(Method):
    """Keep the keys with the highest cosine to the queries that are least similar to the mean query.

    Same: for each head, the queries with the lowest cosine to its mean query are selected; keys are ranked by their
    cosine to these, aggregated over the queries and then over the heads of a query group.
    Differs: the paper selects keys for the attention of one prompt chunk and keeps all of them in the cache. Here the
    others are evicted permanently, from a prompt over `prompt_budget`, which the method is meant for, and from any
    window. The queries are the stored ones; for a prompt, these come after it. The paper's number of queries and its
    aggregation over them were not available to us; we use the maximum, so that one query that needs a key is enough.
    """

    num_observed: Count = Field(16, description="Number of stored queries per head that keys are compared with.")
    over_queries: Literal["max", "mean"] = Field("max", description="How cosines are aggregated over the queries.")

    def score(self, window: Window) -> Tensor:
        # float64: in float32, the rounding of products with so few rows would depend on the batch size.
        queries = normalize(window.grouped_queries().double(), dim=-1)
        mean = window.grouped_queries().double().mean(dim=3, keepdim=True)
        unlike = (queries * normalize(mean, dim=-1)).sum(dim=-1)  # [batch, num_kv_heads, group_size, num_queries]
        count = min(self.num_observed, unlike.shape[-1])
        chosen = unlike.topk(count, dim=-1, largest=False).indices
        queries = queries.gather(3, chosen.unsqueeze(-1).expand(*chosen.shape, queries.shape[-1]))
        keys = normalize(window.keys.double(), dim=-1)
        cosines = torch.einsum("bhgqd,bthd->bhgqt", queries, keys)
        best = cosines.amax(dim=3) if self.over_queries == "max" else cosines.mean(dim=3)
        return best.mean(dim=2).float()
