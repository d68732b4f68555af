"""What was kept and evicted of one request: in the `usage` of its response, if asked for, and in the request log.

Both follow from the layout and the lengths of prompt and answer, so the front end computes them by itself.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from kvllm.config import METHOD_KEY, RATIO_KEY, REQUEST_KEYS, USAGE_KEY
from kvllm.layout import RequestGeometry

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import RequestState

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers


@dataclass
class KvUsage:
    """Sums over all sequences of a response. A sequence's last token has no KV pair, so it is not counted.

    kept_tokens:    tokens in the KV cache when the sequence ended, prompt included
    evicted_tokens: tokens that compressions evicted
    compressions:   windows compressed
    """

    kept_tokens: int = 0
    evicted_tokens: int = 0
    compressions: int = 0

    def add(self, geometry: RequestGeometry | None, num_prompt_tokens: int, num_generated_tokens: int) -> KvUsage:
        """Add one sequence, and return its own counts.

        geometry: None: it was not compressed
        """
        computed = num_prompt_tokens + max(num_generated_tokens - 1, 0)
        events = evicted = 0
        if geometry is not None and num_generated_tokens:
            events = geometry.num_events(num_prompt_tokens, computed - 1)  # the last step started one token earlier
            evicted = sum(geometry.num_evicted(num_prompt_tokens, event) for event in range(events))
        self.kept_tokens += computed - evicted
        self.evicted_tokens += evicted
        self.compressions += events
        return KvUsage(computed - evicted, evicted, events)


# The usage of the response in progress. An HTTP request with several prompts makes its requests in tasks of its own,
# which inherit this.
_asking: ContextVar[KvUsage | None] = ContextVar("kvllm_asking", default=None)


class Watch:
    """Counts one request; an attribute of the output queue that its sequences share.

    method: None: requests of this engine have no choice
    """

    def __init__(self, geometry: RequestGeometry | None, ratio: float, log: bool, method: str | None = None) -> None:
        self.geometry = geometry
        self.log = log
        self.chosen = f"{RATIO_KEY}={ratio:g}" + (f", {METHOD_KEY}={method}" if method else "")
        self.response = _asking.get()

    def finish(self, state: RequestState) -> None:
        """Called once for each sequence."""
        if self.response is None and not self.log:
            return
        num_generated = state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0
        total = self.response if self.response is not None else KvUsage()
        own = total.add(self.geometry, state.prompt_len, num_generated)
        if self.log:
            logger.info(
                "KvLLM: request %s: %d prompt tokens (%d cached), %d generated, %s: %d KV tokens kept, %d evicted "
                "in %d compressions.",
                state.external_req_id, state.prompt_len, state.num_cached_tokens, num_generated, self.chosen,
                own.kept_tokens, own.evicted_tokens, own.compressions,
            )  # fmt: skip


def check_body(request: Any) -> None:
    """Raise VLLMValidationError if our parameters would have no effect: outside `vllm_xargs`, or with beam search."""
    for key in REQUEST_KEYS:
        if key in (request.model_extra or {}):
            raise VLLMValidationError(
                f'{key} has no effect here: send it as "vllm_xargs": {{"{key}": ...}}.', parameter=key
            )
    if asks(request) and request.use_beam_search:
        raise VLLMValidationError(
            f"{USAGE_KEY}: not available with beam search, which is not compressed; leave it out.",
            parameter=USAGE_KEY,
        )


def asks(request: Any) -> bool:
    return bool((request.vllm_xargs or {}).get(USAGE_KEY))


async def respond(create: Callable[[], Awaitable[Any]]) -> Any:
    """The response of `create()`, with `usage.kv_cache` in it."""
    usage = KvUsage()
    _asking.set(usage)
    response = await create()
    if isinstance(response, AsyncGenerator):
        return _in_stream(response, usage)
    if getattr(response, "usage", None) is not None:
        response.usage.kv_cache = asdict(usage)
    return response


async def _in_stream(chunks: AsyncGenerator[str, None], usage: KvUsage) -> AsyncGenerator[str, None]:
    """Server-sent events; the one without choices has the usage of the whole response."""
    _asking.set(usage)  # the stream runs in another task
    async for chunk in chunks:
        if '"choices":[]' in chunk and '"usage":{' in chunk:
            body = json.loads(chunk.removeprefix("data: "))
            body["usage"]["kv_cache"] = asdict(usage)
            chunk = f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
        yield chunk
