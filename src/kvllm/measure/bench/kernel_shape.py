"""What `kvllm bench kernels` measures at: a model's shape and the sizes of a compression."""

from __future__ import annotations

from dataclasses import dataclass

from kvllm.config import KvConfig
from kvllm.measure.bench.spec import option


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Qwen3-8B with the default KvConfig, unless other numbers are given."""

    num_layers: int = option(36, "Layers of the model.")
    num_heads: int = option(32, "Query heads of a layer.")
    num_kv_heads: int = option(8, "KV heads of a layer.")
    head_dim: int = option(128, "Dimensions of a head.")
    query_stride: int = option(KvConfig().query_stride, "Each head keeps the query of every n-th token.")
    query_span: int = option(KvConfig().query_span, "Newest tokens that queries are kept of.")
    block_size: int = option(16, "Tokens in one KV block.")
    num_candidates: int = option(KvConfig().window_size, "Tokens compressed at once.")
    num_kept: int = option(80, "Tokens of them that are kept.")
    dtype: str = option("bfloat16", "The model's.")
    kv_dtype: str = option("bfloat16", "The KV cache's.")

    @property
    def num_queries(self) -> int:
        return self.query_span // self.query_stride

    @property
    def blocks_each(self) -> int:
        return self.num_candidates // self.block_size
