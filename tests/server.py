"""A real `kvllm serve`, in processes of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

START_SECONDS = 240
MODEL = "small"  # what the server calls it
POOL = 1280  # tokens, in blocks of 32; the model allows 2,048


class Server(NamedTuple):
    url: str
    log: Path
    process: subprocess.Popen[bytes]


@contextmanager
def kvllm_serve(model_dir: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """A float32 server that keeps half of each 64 tokens unless a request says otherwise; stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "kvllm", "serve", str(model_dir), "--retention-ratio", "0.5",
        "--request-ratios", "0.5-0.75,1.0", "--request-methods", "random", "--window-size", "64",
        "--buffer-size", "32", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--block-size", "32",
        "--max-model-len", "2048", "--num-gpu-blocks-override", str(POOL // 32 + 1), "--max-num-seqs", "16",
        "--dtype", "float32", "--served-model-name", MODEL, "--enable-log-requests",
        *arguments,
    ]  # fmt: skip
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment = small | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")
                time.sleep(1)
            yield Server(url, log, server)
        finally:
            server.terminate()
            server.wait(30)


def metric(base_url: str, name: str) -> float:
    """What the server's /metrics say of this name, over all labels."""
    with urllib.request.urlopen(f"{base_url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
