"""Which tokens' queries are stored, and in which entries of a request's ring. The reference and the engine share it.

The ring covers the newest `window_size + buffer_size` tokens after the prompt, which at an event are the window and the
buffer. Each head stores the query of every `query_stride`-th token, one per entry. Heads that share a KV head take
turns: each stores the queries of different tokens, so that together they cover more of the text.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvllm.config import KvConfig
from kvllm.layout import Geometry, IntArray


def query_shifts(query_stride: int, group_size: int) -> IntArray:
    """[group_size] int64: how many tokens a head's stored query is older than that of the first head of its group."""
    return np.arange(group_size, dtype=np.int64) * query_stride // group_size


def entry_of(offset: Any, shift: Any, query_stride: int, num_queries: int) -> tuple[Any, Any]:
    """Whether a head with this shift stores the query of a token, and in which entry of its ring.

    offset: tokens after the protected prompt, from 0, or that number modulo the ring's period
    returns (bool, int), in the broadcast shape of the integers, arrays or tensors; the int is valid where bool is True
    """
    counted = offset + shift
    return counted % query_stride == query_stride - 1, counted // query_stride % num_queries


def query_positions(config: KvConfig, geometry: Geometry, event: int) -> IntArray:
    """Position of each stored query (of a head with shift 0) at event number `event`, relative to its first candidate.

    returns [num_queries] int64, ascending; positions past the last candidate are in the buffer
    """
    # Counted from the end, since no token is missing there: the evicted ones precede the raw tokens.
    end = geometry.shape(event).num_candidates + geometry.buffer_size
    return end - 1 - config.query_stride * np.arange(config.num_queries - 1, -1, -1, dtype=np.int64)


def oldest_entry(config: KvConfig, geometry: Geometry, event: int) -> int:
    """The entry of the oldest query at event number `event`; the others follow in order, around the ring."""
    return geometry.event_at(0, event) // config.query_stride % config.num_queries


def prompt_query_positions(config: KvConfig, geometry: Geometry, num_prompt_tokens: int) -> IntArray:
    """`query_positions` at event 0, relative to the prompt's first token; all queries come after the prompt."""
    return geometry.protected_len(num_prompt_tokens) + query_positions(config, geometry, 0)
