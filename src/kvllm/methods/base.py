"""What every method implements. A method scores and selects; it knows nothing of blocks, engines or policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvllm.budgets import Budget
from kvllm.methods.products import products
from kvllm.methods.rope import Rope


@dataclass(frozen=True)
class Window:
    """The tokens that are candidates of one compression, for a batch of (request, layer) pairs.

    queries:         [batch, num_queries, num_heads, head_dim], after RoPE; the newest tokens' queries, every
                     `query_stride`-th of them
    query_positions: [num_queries], counted from the first candidate; may lie past the last one (the buffer) and
                     need not ascend
    query_shifts:    [group_size], by how many tokens the queries of each head of a group are older; None: by none
    keys, values:    [batch, num_tokens, num_kv_heads, head_dim], keys after RoPE
    positions:       [batch, num_kv_heads, num_tokens], position in the text of each candidate (int64)
    layers:          [batch], index of the layer (int64)
    rope:            how the model rotates queries and keys, each member of the batch its own way where layers differ;
                     None: none of them has a rotary embedding
    """

    queries: Tensor
    query_positions: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    layers: Tensor
    query_shifts: Tensor | None = None
    rope: Rope | None = None

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[2]

    @property
    def head_query_positions(self) -> Tensor:
        """[group_size, num_queries]: where each head's own queries stand, counted as `query_positions`."""
        shifts = self.query_positions.new_zeros(self.queries.shape[2] // self.num_kv_heads)
        if self.query_shifts is not None:
            shifts = self.query_shifts
        return self.query_positions - shifts[:, None]

    def grouped_queries(self) -> Tensor:
        """[batch, num_kv_heads, group_size, num_queries, head_dim] in float32: each KV head with its own queries."""
        grouped = self.queries.float().unflatten(2, (self.num_kv_heads, -1))
        return grouped.permute(0, 2, 3, 1, 4)

    # Worked out once, side by side in memory: what a window is scored and refitted by reads them again and again.

    @cached_property
    def scaled_queries(self) -> Tensor:
        """[batch, num_kv_heads, group_size * num_queries, head_dim] in float32, whose products with keys are logits."""
        return (self.grouped_queries() * self.keys.shape[-1] ** -0.5).flatten(2, 3)

    @cached_property
    def head_keys(self) -> Tensor:
        """[batch, num_kv_heads, num_tokens, head_dim] in float32."""
        return self.keys.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)

    @cached_property
    def head_values(self) -> Tensor:
        """[batch, num_kv_heads, num_tokens, head_dim] in float32."""
        return self.values.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)

    def logits(self) -> Tensor:
        """[batch, num_kv_heads, group_size, num_queries, num_tokens] in float32: scaled dot products, unmasked."""
        return self._logits

    @cached_property
    def _logits(self) -> Tensor:
        logits = products(self.scaled_queries, self.head_keys.transpose(-1, -2))
        return logits.unflatten(2, (-1, self.queries.shape[1]))

    @cached_property
    def weights(self) -> Tensor:
        """[batch, num_kv_heads, group_size, num_queries, num_tokens] in float32: the softmax of `logits`, unmasked."""
        return self._logits.softmax(dim=-1)


@dataclass(frozen=True)
class Kept:
    """What survives: indices into the window, and new keys and values where the method changes them.

    indices:      [batch, num_kv_heads, num_kept], ascending (int64)
    keys, values: [batch, num_kept, num_kv_heads, head_dim], or None: the kept tokens' own
    """

    indices: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None

    def gathered(self, keys: Tensor, values: Tensor) -> Kept:
        """This with keys and values: its own where it has them, otherwise the candidates', which are given."""
        return Kept(
            self.indices,
            take_rows(keys, self.indices) if self.keys is None else self.keys,
            take_rows(values, self.indices) if self.values is None else self.values,
        )


@dataclass(frozen=True)
class LayerShape:
    """The attention layers that are compressed: all of one shape; under tensor parallelism what one rank has of them.

    num_layers: the model's layers, up to the last that is compressed
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class Method(ABC):
    """A frozen dataclass whose fields are its `method_options`; state that a request needs is not kept here."""

    @property
    def uses_rope(self) -> bool:
        """Whether the method needs `Window.rope`, without which it would take the model for one that has none."""
        return False

    @property
    def counts_positions(self) -> bool:
        """Whether the method takes `Window.positions` for the angles of keys, not only for distances between tokens.

        Behind an image M-RoPE's positions are fewer than the tokens.
        """
        return False

    def check_rope(self, rope: Rope | None) -> None:  # noqa: B027 (most have nothing to check)
        """Raise ValueError where the method's options contradict the model's rotary embedding; asked at start."""

    def check_layers(self, shape: LayerShape) -> None:  # noqa: B027 (most have nothing to check)
        """Raise UsageError where the method's files were made for another model; asked at start."""

    def layer_budgets(self, mean_ratio: float, layers: Sequence[int]) -> tuple[Budget, ...]:
        """Groups of layers with ratios of their own, whose mean is `mean_ratio`; empty where all layers keep the same.

        layers: the numbers of the model's layers of full attention
        """
        return ()

    @abstractmethod
    def score(self, window: Window) -> Tensor:
        """[batch, num_kv_heads, num_tokens] in float32: the higher, the longer a token should live."""

    def select(self, scores: Tensor, num_kept: int) -> Tensor:
        """The `num_kept` best of each head, ties to the earlier token, in text order.

        scores:  [batch, num_kv_heads, num_tokens]
        returns  [batch, num_kv_heads, num_kept], ascending (int64)
        """
        return top_k(scores, num_kept)

    def compress(self, window: Window, num_kept: int) -> Kept:
        """Score and select; a method that merges what it evicts overrides this."""
        return Kept(self.select(self.score(window), num_kept))

    def compress_prompt(self, window: Window, num_kept: int) -> Kept:
        """What survives of a prompt (`prompt_budget`), judged by queries that all lie behind it: as of any window."""
        return self.compress(window, num_kept)


def take_rows(tokens: Tensor, indices: Tensor) -> Tensor:
    """Each head's own choice of tokens.

    tokens:  [batch, num_tokens, num_kv_heads, head_dim]
    indices: [batch, num_kv_heads, num_kept]
    returns  [batch, num_kept, num_kv_heads, head_dim]
    """
    return tokens.gather(1, indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))


def top_k(scores: Tensor, num_kept: int) -> Tensor:
    """Indices of the `num_kept` largest along the last axis, ascending; of equals, the earlier ones."""
    # A stable sort, since topk leaves the order of equals to the device.
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_kept]
    return order.sort(dim=-1).values
