"""A worker process of the demo, seen from the parent: its reports, and a log of everything it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvllm.config import CONFIG_KEY
from kvllm.errors import UsageError
from kvllm.measure.bench.throughput import why


class Process:
    """label: what an error calls it"""

    def __init__(self, kind: str, label: str, job_file: Path, log: Path) -> None:
        self.label, self.log = label, log
        environment = {
            **os.environ,
            "VLLM_PLUGINS": CONFIG_KEY if kind == "kvllm" else "",
            # The engine runs in the worker's process: on two cores, another process would cost time.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB to reserve at most; the pool is far smaller
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvllm.measure.demo.worker", kind, str(job_file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment,
            )  # fmt: skip

    def next(self) -> dict[str, Any]:
        """The next report of the process. Raises UsageError if it exits without one."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            figures: dict[str, Any] = json.loads(line)
            return figures
        self.process.wait()
        raise UsageError(
            f"{self.label} failed: {why(self.log)} (its whole log: {self.log}). `kvllm doctor MODEL` checks the "
            "installation; where memory ran out, close other programs."
        )

    def go(self) -> None:
        """Start an engine that has reported ready."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
