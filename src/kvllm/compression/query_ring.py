"""Which tokens' queries are kept, and where: a ring per request that both engines compute alike.

vLLM does not keep queries. The ring holds those of the newest `window_size + buffer_size` tokens after the prompt,
which at an event are the window's own and the buffer's: every `query_stride`-th of each head, one an entry. The heads
that share a KV head take turns: each keeps the queries of tokens of its own, so that together they see more of the
text.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvllm.config import KvConfig
from kvllm.layout import Geometry, IntArray


def query_shifts(query_stride: int, group_size: int) -> IntArray:
    """[group_size]: by how many tokens a head's query in an entry is older than that of the first head of its group."""
    return np.arange(group_size, dtype=np.int64) * query_stride // group_size


def entry_of(offset: Any, shift: Any, query_stride: int, num_queries: int) -> tuple[Any, Any]:
    """Whether a head with this shift keeps the query of a token, and in which entry of its ring.

    offset: tokens after the protected prompt, not negative; it may be counted modulo the ring's period
    returns (bool, int): of numbers, arrays or tensors, whose shapes broadcast; where it is False there is no entry
    """
    counted = offset + shift
    return counted % query_stride == query_stride - 1, counted // query_stride % num_queries


def query_positions(config: KvConfig, geometry: Geometry, event: int) -> IntArray:
    """Position of each stored query (of a head with shift 0) at event number `event`, from the event's first candidate.

    returns [num_queries], ascending: oldest first. Those past the last candidate lie in the buffer
    """
    # Seen from the end the text is dense: what was evicted lies before the candidates, or among the survivors.
    end = geometry.shape(event).num_candidates + geometry.buffer_size
    return end - 1 - config.query_stride * np.arange(config.num_queries - 1, -1, -1, dtype=np.int64)


def oldest_entry(config: KvConfig, geometry: Geometry, event: int) -> int:
    """The entry of the oldest query at event number `event`; the others follow it in their order, around the ring."""
    return geometry.event_at(0, event) // config.query_stride % config.num_queries


def prompt_query_positions(config: KvConfig, geometry: Geometry, num_prompt_tokens: int) -> IntArray:
    """`query_positions` at event 0, but from the first token of the prompt; all queries lie behind the prompt."""
    return geometry.protected_len(num_prompt_tokens) + query_positions(config, geometry, 0)
