"""What a compressor needs of a KV cache: reading an event's candidates and writing its survivors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from kvllm.compression.rows import Due
from kvllm.methods.base import Kept

ALL_LAYERS = slice(None)


class Store(Protocol):
    """The cache of the running requests, and their stored queries.

    `candidates` and `prompt` return handles that only the store's other functions interpret. The batch dimension is
    (event, layer), flattened, so the layers of one event are adjacent.
    """

    max_batch: int  # events whose candidates are copied at once

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    def candidates(self, due: Sequence[Due]) -> Any:
        """A handle to the candidates of events of the same geometry and shape."""

    def prompt(self, due: Due) -> Any:
        """A handle to the prompt that this event 0 cuts."""

    def part(self, candidates: Any, events: slice) -> Any:
        """The candidates of some of the events."""

    def queries(self, candidates: Any, layers: slice = ALL_LAYERS) -> Tensor:
        """[batch, num_queries, num_heads, head_dim] in float32: the stored queries, oldest first."""

    def read(self, candidates: Any, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        """Keys and values, [batch, num_candidates, num_kv_heads, head_dim] each."""

    def write(self, candidates: Any, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        """Overwrite the first candidates with the survivors.

        kept: with both new keys and new values, or with neither; the candidates' own are copied bit for bit
        """
