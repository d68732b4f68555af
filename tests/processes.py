"""Information from the operating system about a server's processes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable
from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Commands of a process's descendants, by pid."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    found: dict[int, str] = {}
    parents = {pid}
    while new := {int(row[0]): row[2] for row in rows if int(row[1]) in parents and int(row[0]) not in found}:
        found |= new
        parents = set(new)
    return found


def left_after(pids: Iterable[int], seconds: float) -> list[int]:
    """The processes that have not ended after so long; as soon as all have, none."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return left


def resident_bytes(pids: Iterable[int]) -> dict[int, int]:
    """Resident memory of each process, by pid."""
    sizes = {}
    for pid in pids:
        (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
        sizes[pid] = int(line.split()[1]) * 1024
    return sizes
