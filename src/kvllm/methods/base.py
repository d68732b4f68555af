"""The interface of a compression method: it scores and selects tokens, independent of blocks, engines and policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvllm.budgets import Budget
from kvllm.methods.attended import Attended, attend
from kvllm.methods.products import products
from kvllm.methods.rope import Rope


@dataclass(frozen=True)
class Window:
    """The candidate tokens of one compression, for a batch of (request, layer) pairs.

    queries:         [batch, num_queries, num_heads, head_dim], after RoPE; every `query_stride`-th of the newest
                     queries
    query_positions: [num_queries], relative to the first candidate; may lie past the last one (in the buffer) and
                     need not be sorted
    query_shifts:    [group_size], how many tokens older than `query_positions` each head's queries are; None: 0
    keys, values:    [batch, num_tokens, num_kv_heads, head_dim], keys after RoPE
    positions:       [batch, num_kv_heads, num_tokens], text position of each candidate (int64)
    layers:          [batch], layer index (int64)
    rope:            the model's rotary embedding, per batch member where layers differ; None if no layer has one
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
        """[group_size, num_queries]: positions of each head's queries, relative to the first candidate."""
        shifts = self.query_positions.new_zeros(self.queries.shape[2] // self.num_kv_heads)
        if self.query_shifts is not None:
            shifts = self.query_shifts
        return self.query_positions - shifts[:, None]

    def grouped_queries(self) -> Tensor:
        """[batch, num_kv_heads, group_size, num_queries, head_dim] in float32: queries grouped by KV head."""
        grouped = self.queries.float().unflatten(2, (self.num_kv_heads, -1))
        return grouped.permute(0, 2, 3, 1, 4)

    # Cached and contiguous: scoring and refitting read these many times.

    @cached_property
    def scaled_queries(self) -> Tensor:
        """[batch, num_kv_heads, group_size * num_queries, head_dim] in float32, times head_dim ** -0.5."""
        grouped = self.grouped_queries()
        scaled = torch.empty(
            grouped.shape, dtype=grouped.dtype, device=grouped.device
        )  # contiguous, as the product itself would not be
        return torch.mul(grouped, self.keys.shape[-1] ** -0.5, out=scaled).flatten(2, 3)

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
    def attended(self) -> Attended:
        """What `scaled_queries` see, without a mask: less work than `weights`, for methods that need no more."""
        return attend(self.scaled_queries, self.head_keys, self.head_values)

    @cached_property
    def weights(self) -> Tensor:
        """[batch, num_kv_heads, group_size, num_queries, num_tokens] in float32: the softmax of `logits`, unmasked."""
        return self._logits.softmax(dim=-1)


@dataclass(frozen=True)
class Kept:
    """The survivors: indices into the window, and new keys and values if the method changes them.

    indices:      [batch, num_kv_heads, num_kept], ascending (int64)
    keys, values: [batch, num_kept, num_kv_heads, head_dim]; None: unchanged
    """

    indices: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None

    def gathered(self, keys: Tensor, values: Tensor) -> Kept:
        """The same survivors with keys and values filled in: where they are None, gathered from the candidates."""
        return Kept(
            self.indices,
            take_rows(keys, self.indices) if self.keys is None else self.keys,
            take_rows(values, self.indices) if self.values is None else self.values,
        )


@dataclass(frozen=True)
class LayerShape:
    """The shape that all compressed attention layers share, on one rank under tensor parallelism.

    num_layers: number of model layers up to and including the last compressed one
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class Method(ABC):
    """Base class. Subclasses are frozen dataclasses whose fields are their `method_options`; they hold no state."""

    @property
    def uses_rope(self) -> bool:
        """Whether the method reads `Window.rope`, which must then be set unless the model has no rotary embedding."""
        return False

    @property
    def counts_positions(self) -> bool:
        """Whether the method derives the rotation of keys from `Window.positions`.

        That is wrong for M-RoPE, where positions after an image are lower than the token count.
        """
        return False

    def check_rope(self, rope: Rope | None) -> None:  # noqa: B027 (most have nothing to check)
        """Raise ValueError if the options contradict the model's rotary embedding; called at startup."""

    def check_layers(self, shape: LayerShape) -> None:  # noqa: B027 (most have nothing to check)
        """Raise UsageError if the method's files were made for another model; called at startup."""

    def layer_budgets(self, mean_ratio: float, layers: Sequence[int]) -> tuple[Budget, ...]:
        """Groups of layers and their ratios, whose mean is `mean_ratio`; empty if all layers share one ratio.

        layers: numbers of the model's full-attention layers
        """
        return ()

    @abstractmethod
    def score(self, window: Window) -> Tensor:
        """[batch, num_kv_heads, num_tokens] in float32: tokens with the highest scores are kept."""

    def select(self, scores: Tensor, num_kept: int) -> Tensor:
        """The `num_kept` highest-scoring tokens of each head, in text order; ties go to the earlier token.

        scores:  [batch, num_kv_heads, num_tokens]
        returns  [batch, num_kv_heads, num_kept], ascending (int64)
        """
        return top_k(scores, num_kept)

    def compress(self, window: Window, num_kept: int) -> Kept:
        """Score and select. Methods that also merge or change tokens override this."""
        return Kept(self.select(self.score(window), num_kept))

    def compress_prompt(self, window: Window, num_kept: int) -> Kept:
        """Compress a prompt that exceeds `prompt_budget`, as any other window; all queries come after it."""
        return self.compress(window, num_kept)


def take_rows(tokens: Tensor, indices: Tensor) -> Tensor:
    """Gather each head's own selection of tokens.

    tokens:  [batch, num_tokens, num_kv_heads, head_dim]
    indices: [batch, num_kv_heads, num_kept]
    returns  [batch, num_kept, num_kv_heads, head_dim]
    """
    return tokens.gather(1, indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))


def top_k(scores: Tensor, num_kept: int) -> Tensor:
    """Indices of the `num_kept` largest entries of the last axis, ascending; ties go to the earlier entry."""
    num_tokens = scores.shape[-1]
    if scores.is_cpu and scores.dtype == torch.float32 and 0 < num_kept < num_tokens:
        return _top_k_cpu(scores, num_kept)
    # Stable sort: topk breaks ties differently from device to device.
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_kept]
    return order.sort(dim=-1).values


def _top_k_cpu(scores: Tensor, num_kept: int) -> Tensor:
    """`top_k` in a fifth of the time: without ties, nothing has to be sorted stably, or at all but the indices.

    Every score and index become one integer, the larger the better: the score's bits, which for numbers of one sign
    order as the numbers do, above the negated index.
    """
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # the sign of a NaN means nothing
    bits = (scores + 0.0).view(torch.int32)  # 0.0: a negative zero becomes positive
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    joined = (ordered << 32) - torch.arange(scores.shape[-1])
    kept = np.partition(joined.numpy(), -num_kept, axis=-1)[..., -num_kept:]
    return torch.from_numpy(np.sort(-kept & 0xFFFFFFFF, axis=-1))
