"""Steps of a batch that goes on as before: its requests decode and none has an event, so little has to be worked out.

Nearly all steps are of this kind, and in a small model on a CPU what is worked out in Python takes a good part of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvllm.compression.staged_queries import StepQueries
from kvllm.kernels.block_tables import join_segments_ref
from kvllm.layout import IntArray


@dataclass
class SteadyBatch:
    """The requests of the last step, and what is known of the steps that follow while each computes one token a step.

    names:               request ids
    num_removed:         [num_reqs], tokens that attention skips; None if there are none
    num_computed_tokens: of each request, at the start of the next step
    coming:              what is stored of the steps before the next event, or of the first of them, the last one first
    """

    names: list[str]
    num_removed: IntArray | None
    num_computed_tokens: list[int]
    coming: list[StepQueries]

    def next_step(self, names: list[str], num_computed_tokens: list[int], num_tokens: int) -> StepQueries | None:
        """What is stored of the step that begins; None if it is not of these requests with one token each.

        Also None if the step has an event, or is too far ahead. num_tokens: of all requests in this step
        """
        if num_tokens != len(names) or names != self.names or num_computed_tokens != self.num_computed_tokens:
            return None
        if not self.coming:
            return None
        self.num_computed_tokens = [number + 1 for number in num_computed_tokens]
        return self.coming.pop()


class JoinedTables:
    """Block tables and lengths as attention reads them, from step to step of a steady batch.

    block_table: [num_reqs, max_blocks] int32, block ids by physical index
    seq_lens:    [num_reqs] int32, physical lengths
    """

    def __init__(
        self,
        block_table: Tensor,
        seq_lens: Tensor,
        num_removed: IntArray,
        survivor_blocks: Tensor,
        plan: Tensor,
        block_size: int,
    ) -> None:
        """Join the segments in copies of both; arguments as of `join_segments_ref`, in the host's memory."""
        self.block_size = block_size
        self.num_reqs = len(num_removed)
        self.block_table, self.seq_lens = block_table.clone(), seq_lens.clone()
        join_segments_ref(self.block_table, seq_lens[: self.num_reqs], self.seq_lens, survivor_blocks, plan, block_size)
        # In NumPy, which takes a part of the time for so few numbers.
        self._num_removed = num_removed.astype(np.int32)
        self._block_table, self._seq_lens = self.block_table.numpy(), self.seq_lens.numpy()
        self._find_next_block()

    def _find_next_block(self) -> None:
        """Find the length of the first request up to which no request has a token in a further block."""
        left = -self._seq_lens[: self.num_reqs] % self.block_size
        self._last_length = int(self._seq_lens[0] + left.min())

    def extend(self, block_table: Tensor, seq_lens: Tensor) -> bool:
        """Take over the next step's tables of a steady batch, in which only blocks have been added at the end.

        returns False, and does nothing, if they have another shape
        """
        if not len(seq_lens) == len(self.seq_lens) == self.num_reqs or block_table.shape != self.block_table.shape:
            return False
        logical = seq_lens.numpy()
        np.subtract(logical, self._num_removed, out=self._seq_lens)
        if self._seq_lens[0] <= self._last_length:
            return True
        newest, requests = (logical - 1) // self.block_size, np.arange(self.num_reqs)
        to = newest - self._num_removed // self.block_size
        self._block_table[requests, to] = block_table.numpy()[requests, newest]
        self._find_next_block()
        return True
