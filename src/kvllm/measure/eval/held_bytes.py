"""KV cache bytes per token of text that a configuration holds, summed over the full-attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvllm.compression.rounding import packed_block_tokens
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.layers import full_heads, local_layers
from kvllm.layout import Geometry, IntArray
from kvllm.measure.eval.cache_formats import cache_formats
from kvllm.measure.eval.sweep import Case
from kvllm.support import PLAIN_BITS


@dataclass(frozen=True)
class Held:
    """Bytes per token of text.

    old:  for compressed tokens; without compression, for all
    life: for all tokens, including prompt and buffer, on average while some answers are generated
    """

    old: float
    life: float


def geometry_of(case: Case, block_size: int, head_dim: int) -> Geometry | None:
    """The geometry with whole packed blocks per window, as on GPUs; None if nothing is compressed.

    Raises UsageError if the sizes do not fit.
    """
    if case.config.budgets:
        raise UsageError(
            f"{case.label}: tables of ratios are not supported here. Use the table's mean, which takes the same number "
            "of bytes."
        )
    bits = case.config.survivor_bits
    tokens = packed_block_tokens(block_size, head_dim, bits) if bits < PLAIN_BITS else None
    return Geometry.from_config(case.config, block_size, packed_tokens=tokens)


def held_bytes(case: Case, config: Any, block_size: int, lengths: list[tuple[int, int]]) -> Held:
    """Bytes per token of a case, in 16 bits or its cache's precision.

    config:  a transformers config
    lengths: prompt and answer lengths, in tokens
    A packed block has the size of a plain block in 16 bits, whatever the precision of the rest of the cache.
    """
    text = config.get_text_config()
    heads = full_heads(text)
    head_dim, num_kv_heads = heads.head_dim, heads.num_kv_heads
    full: float = 2 * head_dim * PLAIN_BITS // 8
    locals_ = local_layers(text, getattr(text, "max_position_embeddings", None))
    formats = [f for f, local in zip(cache_formats(case.cache, config), locals_, strict=True) if local is None]
    plain = num_kv_heads * sum(full if each is None else each.token_bytes(head_dim) for each in formats)
    geometry = geometry_of(case, block_size, head_dim)
    if geometry is None:
        return Held(plain, plain)
    packed = geometry.packed_tokens is not None
    # Relative to a token's space in a plain block.
    survivor = num_kv_heads * full * len(formats) if packed else plain
    held = texts = 0.0
    for num_prompt, num_answer in lengths:
        computed: IntArray = num_prompt + np.arange(num_answer)
        prompts = np.full_like(computed, num_prompt)
        survivors = geometry.survivors(geometry.num_events(prompts, computed))
        rest = geometry.physical_len(prompts, computed) - survivors
        held += float((survivors * survivor + rest * plain).sum())
        texts += float(computed.sum())
    old = float(geometry.kept_blocks) * block_size * survivor / geometry.interval
    return Held(old, held / texts)


def full_bytes(config: Any) -> float:
    """Bytes per token in 16 bits."""
    return held_bytes(Case("", KvConfig(retention_ratio=1.0)), config, 16, []).old
