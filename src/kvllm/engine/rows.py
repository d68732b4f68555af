"""What a worker keeps of each running request beside its KV cache. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass
class RunningRequest:
    """One compressed request.

    row:        its row of the query bank
    num_events: compressions done
    survivors:  [num_layers, num_kv_heads, num_survivors] (int64), text positions of its survivors, where they can
                become candidates again
    """

    row: int
    num_events: int = 0
    survivors: Tensor | None = None


class RunningRequests:
    """The compressed requests that the scheduler has running, by id, each with a row of its own.

    A request is running from the first step that schedules it until the scheduler reports it preempted or finished.
    Steps that leave it out change nothing: it keeps its KV blocks and continues where it was, so it needs its queries.
    A preempted request is computed again from its first token, so nothing of it is kept.

    So there is always a free row: at most `max_num_seqs` requests are running at once, and the step that first
    schedules a request also reports every one that has left since the step before, which must be released first.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self._free_rows = list(range(max_num_seqs))
        self._running: dict[str, RunningRequest] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[str]:
        return iter(self._running)

    def __contains__(self, req_id: object) -> bool:
        return req_id in self._running

    def __getitem__(self, req_id: str) -> RunningRequest:
        return self._running[req_id]

    def admit(self, req_id: str) -> RunningRequest:
        """The request, which gets a row if it has none. RuntimeError if `max_num_seqs` others hold one."""
        if (running := self._running.get(req_id)) is None:
            if not self._free_rows:
                raise RuntimeError(
                    f"KvLLM: request {req_id} is scheduled while max_num_seqs={self.max_num_seqs} others are running: "
                    f"{sorted(self._running)}. This is a bug in KvLLM; please report it."
                )
            running = self._running[req_id] = RunningRequest(self._free_rows.pop())
        return running

    def release(self, req_ids: Iterable[str]) -> None:
        """Forget requests that were preempted or have finished. Ids of others, never admitted, are ignored."""
        for req_id in req_ids:
            if (running := self._running.pop(req_id, None)) is not None:
                self._free_rows.append(running.row)
