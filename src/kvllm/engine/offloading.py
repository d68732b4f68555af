"""What vLLM's OffloadingConnector, which copies blocks to host memory and back, may see of compressed requests.

The connector lists the blocks that a request was ever given, and takes block i for the tokens that hash i names. Of
the prompt that stays true: its blocks are never written again. Generated tokens are moved and their blocks freed, so of
a compressed request the connector sees the prompt alone.

Copies are ordered on the device: each waits for what the compute stream was given before. So a block that an event
emptied is filled by a load only after that event, and a prompt block is stored as its forward pass left it. When the
scheduler gives a block to someone else before its store has run, the connector flushes the store first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
    from vllm.v1.request import Request


class PromptOnly:
    """A request as if it ended with its prompt; all else is the request's own, as it is now.

    A resumed request has generated tokens without hashes; the connector asserts that every full block has one.
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    @property
    def num_tokens(self) -> int:
        return self._request.num_prompt_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def offer_prompt_only(connector: OffloadingConnector, request: Request) -> None:
    """Let the scheduler's half of the connector, which has just been told of the request, see its prompt alone."""
    status = connector.scheduler._req_status[request.request_id]
    status.req = PromptOnly(request)  # type: ignore[assignment]
