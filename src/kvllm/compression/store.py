"""What a compressor needs of a KV cache: read the candidates of an event, write what survives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from kvllm.compression.rows import Due
from kvllm.methods.base import Kept

ALL_LAYERS = slice(None)


class Store(Protocol):
    """The cache of the running requests, and the queries that are kept of them.

    Where the candidates of some events lie is the store's own matter: `candidates` and `prompt` return whatever the
    other functions need to find them. A batch is (event, layer), the layers of one event side by side.
    """

    max_batch: int  # events whose candidates are copied at once

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    def candidates(self, due: Sequence[Due]) -> Any:
        """Where the candidates of events of one geometry and shape lie."""

    def prompt(self, due: Due) -> Any:
        """Where the prompt of an event 0 lies that cuts it."""

    def part(self, candidates: Any, events: slice) -> Any:
        """The candidates of some of the events."""

    def queries(self, candidates: Any, layers: slice = ALL_LAYERS) -> Tensor:
        """[batch, num_queries, num_heads, head_dim] in float32: the stored queries, oldest first."""

    def read(self, candidates: Any, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        """Keys and values, [batch, num_candidates, num_kv_heads, head_dim] each."""

    def write(self, candidates: Any, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        """The survivors overwrite the first of the candidates.

        kept: with new keys and new values, or with neither: then the survivors' own are moved bit for bit
        """
