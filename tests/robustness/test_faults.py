"""Processes stopped or killed while answering: clients get an error, and nothing hangs. Long form only.

Each test needs a server of its own, since none of them survives.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.processes import descendants, left_after
from tests.robustness import LONG
from tests.server import Server, kvllm_serve

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not LONG, reason="long form: KVLLM_LONG=1, or make robustness"),
]
NUM_CLIENTS, MAX_TOKENS = 6, 700


def start_streams(server: Server, pool: ThreadPoolExecutor) -> list[Any]:
    """Futures of answers that are being streamed: (tokens seen, the error or None)."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
    started = []

    def stream(i: int) -> tuple[int, Exception | None]:
        seen = 0
        try:
            for chunk in client.completions.create(
                model="small", prompt=f"Number {i}:", max_tokens=MAX_TOKENS, stream=True,
                extra_body={"ignore_eos": True},
            ):  # fmt: skip
                seen += bool(chunk.choices)
                if seen == 1:
                    started.append(i)
        except openai.OpenAIError as e:
            return seen, e
        except Exception as e:  # httpx's, where the connection breaks between chunks
            return seen, e
        return seen, None

    futures = [pool.submit(stream, i) for i in range(NUM_CLIENTS)]
    while len(started) < NUM_CLIENTS:
        time.sleep(0.1)
    return futures


def test_sigterm_lets_answers_finish_and_ends_with_status_0(model_dir: Path, tmp_path: Path) -> None:
    with kvllm_serve(model_dir, tmp_path / "log", "--shutdown-timeout", "240") as server:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            futures = start_streams(server, pool)
            server.process.send_signal(signal.SIGTERM)
            results = [future.result(timeout=280) for future in futures]
        assert results == [(MAX_TOKENS, None)] * NUM_CLIENTS
        assert server.process.wait(60) == 0


def test_a_killed_engine_core_is_an_error_to_clients_and_ends_the_server(model_dir: Path, tmp_path: Path) -> None:
    with kvllm_serve(model_dir, tmp_path / "log") as server:
        processes = descendants(server.process.pid)
        (core,) = (pid for pid, args in processes.items() if "EngineCore" in args)
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            futures = start_streams(server, pool)
            os.kill(core, signal.SIGKILL)
            results = [future.result(timeout=60) for future in futures]
        assert all(error is not None and seen < MAX_TOKENS for seen, error in results), results
        server.process.wait(60)  # with status 0, as vLLM ends then
        assert not left_after(processes, seconds=30), "a process is left over"
    with kvllm_serve(model_dir, tmp_path / "log2") as server:  # a server started again is whole
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        answer = client.completions.create(
            model="small", prompt="Hello", max_tokens=200, extra_body={"ignore_eos": True}
        )
        assert answer.usage and answer.usage.completion_tokens == 200


def test_a_killed_api_server_ends_its_answers_with_an_error_and_the_server(model_dir: Path, tmp_path: Path) -> None:
    """Of two API servers: vLLM then stops the rest too, so that whoever supervises the process starts it anew."""
    with kvllm_serve(model_dir, tmp_path / "log", "--api-server-count", "2") as server:
        processes = descendants(server.process.pid)
        victim = next(pid for pid, args in processes.items() if "apiserver" in args.lower())
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            futures = start_streams(server, pool)
            os.kill(victim, signal.SIGKILL)
            results = [future.result(timeout=120) for future in futures]
        assert any(error is not None for _, error in results), results
        assert all(error is not None or seen == MAX_TOKENS for seen, error in results), results
        server.process.wait(60)
        assert not left_after(processes, seconds=30), "a process is left over"
