"""R-KV (arXiv:2505.24133): important and non-redundant tokens."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.methods.snapkv import SnapKV
from kvllm.options import Cosine, Count, KernelSize, Share, strict_dataclass


@register("rkv")
@strict_dataclass
class RKV(Method):
    """Keep tokens that are important and unlike others.

    Score: importance_weight * importance - (1 - importance_weight) * redundancy.
    Same: importance is SnapKV's score while decoding (8 queries, max pooling of 7); redundancy is a softmax over tokens
    of the mean cosine to the other keys of the head; the newest of a set of similar keys is not counted as redundant.
    Differs: the newest 8 tokens, which R-KV always keeps and also counts as similar keys, are in the buffer here and so
    not candidates. The 8 queries are stored ones, so they span 8 * `query_stride` tokens.
    """

    importance_weight: Share = Field(
        0.1, description="Weight of importance against redundancy (the paper's lambda: 0.1; 0.07 in its code)."
    )
    similarity_threshold: Cosine = Field(0.5, description="Cosine above which two keys count as similar.")
    num_observed: Count = Field(8, description="Number of newest stored queries used to compute importance.")
    kernel_size: KernelSize = 7

    @property
    def importance(self) -> SnapKV:
        return SnapKV(num_observed=self.num_observed, kernel_size=self.kernel_size)

    def score(self, window: Window) -> Tensor:
        # One request and layer at a time: the cosines are a [num_kv_heads, num_tokens, num_tokens] tensor.
        redundant = torch.stack([redundancy(keys, self.similarity_threshold) for keys in window.keys.float()])
        return self.importance_weight * self.importance.score(window) - (1 - self.importance_weight) * redundant


def redundancy(keys: Tensor, threshold: float) -> Tensor:
    """How similar each key is to the others of its head.

    In the row of every key, the newest key more similar than `threshold` is set to zero (the first token if there is
    none), so that the newest of many similar keys is not counted as redundant.

    keys:    [num_tokens, num_kv_heads, head_dim] in float32
    returns  [num_kv_heads, num_tokens]; each row sums to 1
    """
    keys = keys.transpose(0, 1)
    keys = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosines = keys @ keys.transpose(-1, -2)
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    indices = torch.arange(cosines.shape[-1], device=keys.device)
    spared = torch.where(cosines > threshold, indices, 0).amax(dim=-1, keepdim=True)
    return cosines.scatter(-1, spared, 0.0).mean(dim=1).softmax(dim=-1)
