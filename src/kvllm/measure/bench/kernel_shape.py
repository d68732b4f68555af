"""Options of `kvllm bench kernels`: the shapes of a model and of a compression."""

from __future__ import annotations

from dataclasses import dataclass

from kvllm.config import KvConfig
from kvllm.measure.bench.spec import option


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The defaults are those of Qwen3-8B with the default KvConfig."""

    num_layers: int = option(36, "Number of layers.")
    num_heads: int = option(32, "Number of query heads per layer.")
    num_kv_heads: int = option(8, "Number of KV heads per layer.")
    head_dim: int = option(128, "Head dimension.")
    query_stride: int = option(KvConfig().query_stride, "Each head stores the query of every N-th token.")
    query_span: int = option(KvConfig().query_span, "Number of newest tokens whose queries are stored.")
    block_size: int = option(16, "Tokens per KV block.")
    num_candidates: int = option(KvConfig().window_size, "Number of tokens compressed at once.")
    num_kept: int = option(80, "Number of tokens kept of these.")
    dtype: str = option("bfloat16", "Data type of the model.")
    kv_dtype: str = option("bfloat16", "Data type of the KV cache.")

    @property
    def num_queries(self) -> int:
        return self.query_span // self.query_stride

    @property
    def blocks_each(self) -> int:
        return self.num_candidates // self.block_size
