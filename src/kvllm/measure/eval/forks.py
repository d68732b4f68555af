"""Many configurations on one text: what is before the first compression is computed once."""

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
    """The number of computed tokens at the first compression; past every text where nothing is compressed.

    Packed blocks change nothing here: they hold what is left.
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
    """A request that compresses nothing, fed up to the last of the configurations' first compressions.

    packed, formats: as of `Request`
    keep_from:       the first row whose `full_logprobs` are wanted, if that is before the first of them
    returns that request, the replays of it between one first compression and the next (the rows up to the first of
    them without `full_logprobs`), and for each configuration that compresses anything in this text its own request,
    which stands at its first compression
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
