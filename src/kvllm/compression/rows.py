"""The compression state of running requests: integers, one row per request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvllm.config import KvConfig
from kvllm.layout import Geometry, IntArray

# The columns of `RequestRows`; the first NUM_PLANNED of them describe a block table (`kvllm.kernels.block_tables`).
PROMPT, PREFIX, TAIL, EVENTS, START, REMOVED = range(6)
NUM_PLANNED = 3


class Due(NamedTuple):
    """A compression that is due."""

    batch_index: int  # the request's index in the step's batch
    row: int  # the request's row in all per-request state: the query bank, positions, block ids
    geometry: Geometry
    num_prompt_tokens: int
    event: int


class RequestRows:
    """The request in each row: its geometry, its method, and where its two segments are.

    columns: [6, max_num_reqs] int64:
             PROMPT   blocks of the prompt that remain; 0 before the first event
             PREFIX   blocks of the prefix segment; 0 before the first event
             TAIL     logical index of the tail segment, in blocks; 0 before the first event
             EVENTS   events done
             START    number of computed tokens from which queries are stored; unreachable if nothing is compressed
             REMOVED  tokens that the attention backend no longer reads: evicted ones and packed survivors
    """

    def __init__(self, config: KvConfig, max_num_reqs: int) -> None:
        self.geometries: list[Geometry | None] = [None] * max_num_reqs
        self.num_prompt_tokens = [0] * max_num_reqs
        self.methods = [config.method] * max_num_reqs
        self._own_method = config.method
        self.columns: IntArray = np.zeros((6, max_num_reqs), np.int64)
        self.columns[START] = np.iinfo(np.int64).max // 2
        # When an event happens does not depend on a request's ratio.
        budget = config.policy == "budget"
        self._interval = config.budget_interval if budget else config.window_size
        self._waiting = config.buffer_size + (config.budget_size if budget else 0)

    def set(self, row: int, geometry: Geometry | None, num_prompt_tokens: int, method: str | None) -> None:
        """Reset a row for a request that starts, or restarts after preemption.

        method: its name; None: the engine's own
        """
        self.geometries[row], self.num_prompt_tokens[row] = geometry, num_prompt_tokens
        self.methods[row] = method or self._own_method
        column = self.columns[:, row]
        column[:] = 0
        column[START] = np.iinfo(np.int64).max // 2
        if geometry is not None:
            column[START] = geometry.protected_len(num_prompt_tokens)

    def begin_step(self, rows: IntArray, num_computed_tokens: IntArray, names: Sequence[str]) -> list[Due]:
        """The compressions that are due at the start of a step of these requests. From now on they count as done.

        rows, num_computed_tokens: [num_reqs]; names: request ids, for the error message
        Raises RuntimeError if a request skipped a compression, or went back before one.
        """
        grown = num_computed_tokens - self.columns[START, rows]
        events = np.maximum((grown - self._waiting) // self._interval, 0)
        behind = events - self.columns[EVENTS, rows]
        if not behind.any():
            return []
        if (wrong := (behind < 0) | (behind > 1)).any():
            counts = {names[i]: (int(events[i] - behind[i]), int(events[i])) for i in np.nonzero(wrong)[0]}
            raise RuntimeError(
                f"KvLLM: the numbers of compressions done and due may differ by at most one, but are (done, due): "
                f"{counts}. This is a bug in KvLLM; please report it."
            )
        return [self._advance(int(i), int(rows[i])) for i in np.nonzero(behind)[0]]

    def next_due(self, rows: IntArray) -> IntArray:
        """[num_reqs]: the number of computed tokens at which each request's next compression is due.

        Never reached by a request that is not compressed. rows: [num_reqs]
        """
        return self.columns[START, rows] + self._waiting + (self.columns[EVENTS, rows] + 1) * self._interval

    def _advance(self, index: int, row: int) -> Due:
        geometry, prompt, column = self.geometries[row], self.num_prompt_tokens[row], self.columns[:, row]
        assert geometry is not None
        event, size = int(column[EVENTS]), geometry.block_size
        column[EVENTS] = done = event + 1
        column[PROMPT] = geometry.prompt_len(prompt, done) // size
        column[PREFIX] = geometry.prefix_len(prompt, done) // size
        column[TAIL] = geometry.tail_start(prompt, done) // size
        column[REMOVED] = geometry.num_removed(prompt, done)
        if geometry.packed_tokens:
            column[REMOVED] += geometry.survivors(done)
        return Due(index, row, geometry, prompt, event)

    def query_codes(
        self, rows: IntArray, num_computed_tokens: IntArray, counts: IntArray, period: int, total: int
    ) -> IntArray:
        """`QueryBank.codes` of each token of a step, [total] int64; -1 if its queries are not stored.

        rows, num_computed_tokens, counts: [num_reqs]; counts: tokens of each request in this step
        period: the period of the query ring, in tokens
        total:  length of the result; entries past the step's tokens are -1
        """
        offsets = num_computed_tokens - self.columns[START, rows]
        oldest: IntArray | int = 0
        if (num_tokens := int(counts.sum())) > len(rows):
            request = np.repeat(np.arange(len(rows)), counts)
            within = np.arange(num_tokens) - np.repeat(np.cumsum(counts) - counts, counts)
            # A chunk may be longer than the ring: only the newest token of an entry is stored.
            oldest = np.maximum(offsets + counts - period, 0)[request]
            offsets, rows = offsets[request] + within, rows[request]
        codes = np.full(total, -1, np.int64)
        codes[:num_tokens] = np.where(offsets >= oldest, rows * period + offsets % period, -1)
        return codes

    def codes_ahead(self, rows: IntArray, num_computed_tokens: IntArray, num_steps: int, period: int) -> IntArray:
        """`query_codes` of the next steps if each request computes one token in each, [num_steps, num_reqs] int64.

        rows, num_computed_tokens: [num_reqs], at the start of the first of these steps
        """
        offsets = num_computed_tokens - self.columns[START, rows] + np.arange(num_steps)[:, None]
        return np.where(offsets >= 0, rows * period + offsets % period, -1)


class RunningRequests:
    """Rows of the running requests by id, for a runner that has no such rows of its own.

    A request runs from the first step that schedules it until the scheduler reports it preempted or finished. A step
    that does not schedule it changes nothing: it keeps its KV blocks and continues later, so its queries are needed. A
    preempted request is recomputed from its first token, so nothing is kept.

    There is always a free row: at most `max_num_seqs` requests run at once, and the step that first schedules a request
    also reports all requests that have left since the previous step, which must be released first.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self._free_rows = list(range(max_num_seqs))
        self._rows: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, req_id: object) -> bool:
        return req_id in self._rows

    def __getitem__(self, req_id: str) -> int:
        return self._rows[req_id]

    def admit(self, req_id: str) -> int:
        """Give a row to a request that has none. Raises RuntimeError if `max_num_seqs` others hold one."""
        if not self._free_rows:
            raise RuntimeError(
                f"KvLLM: request {req_id} is scheduled while max_num_seqs={self.max_num_seqs} others are running: "
                f"{sorted(self._rows)}. This is a bug in KvLLM; please report it."
            )
        assert req_id not in self._rows
        row = self._rows[req_id] = self._free_rows.pop()
        return row

    def release(self, req_ids: Iterable[str]) -> None:
        """Free the rows of preempted or finished requests; unknown ids are ignored."""
        for req_id in req_ids:
            if (row := self._rows.pop(req_id, None)) is not None:
                self._free_rows.append(row)
