"""Replay many configurations on one text, computing the part before the first compression only once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvllm.config import KvConfig
from kvllm.layout import request_geometry
from kvllm.reference import Replay, Request, feed
from kvllm.reference.formats import CacheFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def first_event(config: KvConfig, num_prompt_tokens: int, block_size: int) -> int:
    """Number of computed tokens at the first compression; larger than any text if nothing is compressed.

    Independent of packed blocks, which only affect the survivors.
    """
    geometry = request_geometry(config, block_size)
    return geometry.event_at(num_prompt_tokens, 0) if geometry else sys.maxsize


def fork_all(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    configs: Sequence[KvConfig],
    block_size: int,
    packed: bool = False,
    formats: Sequence[CacheFormat | None] | None = None,
    keep_from: int | None = None,
) -> tuple[Request, list[Replay], dict[int, Request]]:
    """Feed a text to an uncompressed request and fork it at each configuration's first compression.

    packed, formats: as in `Request`
    keep_from:       first row to return `full_logprobs` for, if before the earliest first compression
    returns the uncompressed request, fed up to the latest first compression; its replays between consecutive first
            compressions (without `full_logprobs` up to the earliest); and for each configuration that compresses
            anything in this text, its own request, positioned at its first compression
    """
    firsts = [first_event(config, num_prompt_tokens, block_size) for config in configs]
    most_queries = max((config.query_span for config in configs), default=0)
    full = Request(model, num_prompt_tokens, max_queries=most_queries, formats=formats)
    parts: list[Replay] = []
    forks: dict[int, Request] = {}
    stops = {first for first in firsts if first < len(token_ids) - 1} | ({keep_from} if keep_from else set())
    for start in sorted(stops):
        parts.append(feed(full, token_ids, start, keep_full=bool(parts)))
        for i, first in enumerate(firsts):
            if first == start:
                forks[i] = Request.fork(full, configs[i], block_size, packed)
    return full, parts, forks
