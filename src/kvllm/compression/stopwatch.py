"""Measures how long compressions take on their device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Accumulates seconds. On a GPU it uses CUDA events, which it reads once they have completed.

    So it never waits for the device, and `take` may not include the newest compressions.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._unused: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the time within this context."""
        if not self.on_gpu:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start
            return
        pair = self._unused.pop() if self._unused else (_event(), _event())
        pair[0].record()
        yield
        pair[1].record()
        self._pending.append(pair)

    def collect(self) -> None:
        """Read the completed events; call this regularly, or they accumulate."""
        while self._pending and self._pending[0][1].query():
            pair = self._pending.popleft()
            self.seconds += pair[0].elapsed_time(pair[1]) / 1000
            self._unused.append(pair)

    def take(self) -> float:
        """Seconds measured since the last call, without events that have not completed."""
        self.collect()
        taken, self.seconds = self.seconds, 0.0
        return taken


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
