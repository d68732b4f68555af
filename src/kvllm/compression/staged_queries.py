"""Collects the queries of several steps, so that the query bank rounds and stores them in one call.

On a CPU, storing the queries of one decoded token is a dozen small operations: their overhead exceeds the work.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvllm.compression.query_bank import QueryBank
from kvllm.layout import IntArray

MOST_STAGED = 64  # tokens


class StepQueries(NamedTuple):
    """Which queries of a step are stored.

    num_tokens: tokens of the step
    tokens:     [num_stored] int64, the tokens of which any head's query is stored; None: all of them
    codes:      [num_stored], of these tokens, as of `QueryBank.targets`
    """

    num_tokens: int
    tokens: Tensor | None
    codes: IntArray


class StagedQueries:
    """Queries that are not in the bank yet. Call `flush` before the bank is read, and before a row gets a new request.

    dtype: the model's
    """

    def __init__(self, bank: QueryBank, dtype: torch.dtype) -> None:
        self.bank = bank
        self.dtype = dtype
        self.num_layers = len(bank.queries)
        # No two of so many tokens share an entry of a ring, as `QueryBank.targets` requires.
        self.capacity = min(MOST_STAGED, bank.num_queries)
        self._buffer = self._filled = self._allocate(self.capacity)
        # Many steps store one token, and a view takes nearly as long to make as to fill.
        self._views_of_one = [token.unbind() for token in self._buffer.split(1, dim=1)]
        self._codes: list[IntArray] = []  # of the tokens staged so far
        self._num_staged = 0
        # Of the current step, if it stores any: the part of each layer, [num_stored, num_heads, head_dim].
        self._views: tuple[Tensor, ...] | None = None
        self._step: StepQueries
        self._num_missing = 0  # layers that have not been captured

    def _allocate(self, num_tokens: int) -> Tensor:
        return torch.empty(self.num_layers, num_tokens, self.bank.num_heads, self.bank.head_dim, dtype=self.dtype)

    def steps(self, codes: IntArray) -> list[StepQueries]:
        """Work out what to store of several steps; codes: [num_steps, num_tokens], as of `QueryBank.targets`."""
        made = []
        for own, stored in zip(codes, self.bank.stores_any(codes), strict=True):
            tokens = np.flatnonzero(stored)
            everything = len(tokens) == len(own)
            made.append(StepQueries(len(own), None if everything else torch.from_numpy(tokens), own[tokens]))
        return made

    def begin_step(self, step: StepQueries) -> None:
        """Expect `capture` for every layer."""
        self._views = None
        start, count = self._num_staged, len(step.codes)
        if not count:
            return
        if start + count > self.capacity:
            self.flush()
            start = 0
        # A chunk of a request that is recomputed may be longer; it is stored by its own.
        self._filled = self._buffer if count <= self.capacity else self._allocate(count)
        self._views = self._views_of_one[start] if count == 1 else self._filled[:, start : start + count].unbind()
        self._step, self._num_missing = step, self.num_layers

    def skip_step(self) -> None:
        """Capture nothing in a dummy run."""
        self._views = None

    def capture(self, layer: int, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> None:
        """Copy a layer's queries; query: [at least num_tokens, num_heads, head_dim], after RoPE

        Takes, and leaves alone, what else the hook of a layer hands over: a call between the two would show in a step.
        """
        views = self._views
        if views is None:
            return
        num_tokens, tokens, codes = self._step
        if tokens is not None:
            torch.index_select(query, 0, tokens, out=views[layer])
        else:
            views[layer].copy_(query if len(query) == num_tokens else query[:num_tokens])
        self._num_missing -= 1
        if not self._num_missing:
            self._views = None
            self._codes.append(codes)
            self._num_staged += len(codes)
            if self._num_staged > self.capacity:
                self.flush()

    def flush(self) -> None:
        """Store what was captured."""
        if not self._num_staged:
            return
        targets = self.bank.targets(np.concatenate(self._codes))
        self.bank.put(self._filled[:, : self._num_staged], targets)
        self._filled = self._buffer  # frees that of a long chunk
        self._codes.clear()
        self._num_staged = 0
