"""QuoKA (arXiv:2602.08722): the keys that unusual queries point at."""

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
    """Keep the keys with the highest cosine to the queries that are least like the mean query.

    Same: of each head the queries with the lowest cosine to its mean query are retained; keys are ranked by the cosine
    to them, over those queries and then over the heads of a query group.
    Differs: the paper picks keys for the attention of one chunk of the prompt and keeps all in the cache. Here the rest
    is evicted, for good: of a prompt over `prompt_budget`, which is what the method is for, and of any window. The
    queries are the stored ones, which of a prompt are those behind it. Their number and how scores are summed up over
    queries were not available to us: the maximum, so that one query that needs a key is enough.
    """

    num_observed: Count = Field(16, description="Number of stored queries of each head that keys are compared with.")
    over_queries: Literal["max", "mean"] = Field("max", description="How the cosines to the queries are summed up.")

    def score(self, window: Window) -> Tensor:
        # float64: products with so few rows round differently from batch to batch.
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
