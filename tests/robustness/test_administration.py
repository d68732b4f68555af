"""Administration while a server is answering: pause, sleep, reset the prefix cache, reload weights.

vLLM offers these over HTTP with VLLM_SERVER_DEV_MODE=1. Each greedy answer is the one given without the interruption.
Long form only: the server is one of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.models import save_small_chat_model
from tests.robustness import LONG
from tests.robustness.test_soak import ask
from tests.server import Server, kvllm_serve, metric

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not LONG, reason="long form: KVLLM_LONG=1, or make robustness"),
]
NUM_CLIENTS, MAX_TOKENS = 5, 400
Act = Callable[[httpx.AsyncClient], Awaitable[None]]


@pytest.fixture(scope="module")
def admin_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = save_small_chat_model(tmp_path_factory.mktemp("model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        with kvllm_serve(folder, tmp_path_factory.mktemp("server") / "log") as server:
            yield server


async def post(client: httpx.AsyncClient, path: str, **options: Any) -> httpx.Response:
    response = await client.post(path, **options)
    assert response.status_code == 200, f"{path}: HTTP {response.status_code}: {response.text[:500]}"
    return response


async def pause(client: httpx.AsyncClient) -> None:
    await post(client, "/pause", params={"mode": "keep"})
    assert (await client.get("/is_paused")).json()["is_paused"]
    await asyncio.sleep(0.5)
    await post(client, "/resume")


async def empty_prefix_cache(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        await post(client, "/reset_prefix_cache", params={"reset_running_requests": True})
        await asyncio.sleep(0.2)


async def reload_weights(client: httpx.AsyncClient) -> None:
    """The same weights, so the same answers."""
    await post(client, "/pause", params={"mode": "keep"})
    await post(client, "/collective_rpc", json={"method": "reload_weights"})
    await post(client, "/resume")


def interrupted(server: Server, act: Act) -> tuple[list[str | None], list[str | None]]:
    """The answers of each request alone, and of all at once with `act` called in the middle."""
    bodies = [
        {"model": "small", "prompt": f"w{i} w{7 * i} w{i + 900}", "temperature": 0, "max_tokens": MAX_TOKENS,
         "ignore_eos": True}
        for i in range(1, NUM_CLIENTS + 1)
    ]  # fmt: skip

    async def run() -> tuple[list[str | None], list[str | None]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            alone = [await ask(client, body) for body in bodies]
            tasks = [asyncio.create_task(ask(client, body)) for body in bodies]
            await asyncio.sleep(1)
            assert not any(task.done() for task in tasks), "the answers ended before anything happened"
            await act(client)
            assert not all(task.done() for task in tasks), "the answers ended before the server went on"
            return alone, list(await asyncio.gather(*tasks))

    return asyncio.run(run())


@pytest.mark.parametrize("act", [pause, empty_prefix_cache, reload_weights])
def test_answers_continue_unchanged(admin_server: Server, act: Act) -> None:
    alone, together = interrupted(admin_server, act)
    assert together == alone
    assert metric(admin_server.url, "vllm:num_requests_running") == 0
    assert metric(admin_server.url, "vllm:kv_cache_usage_perc") == 0


def test_a_pause_that_aborts_ends_the_answers_and_frees_their_blocks(admin_server: Server) -> None:
    async def run() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=admin_server.url, timeout=300) as client:
            body = {"model": "small", "prompt": "w5", "max_tokens": MAX_TOKENS, "ignore_eos": True}
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(NUM_CLIENTS)]
            await asyncio.sleep(1)
            await post(client, "/pause", params={"mode": "abort"})
            answers = [json.loads((await task).text) for task in tasks]
            await post(client, "/resume")
            after = await post(client, "/v1/completions", json=body)
            assert after.json()["usage"]["completion_tokens"] == MAX_TOKENS
            return answers

    for answer in asyncio.run(run()):
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert answer["usage"]["completion_tokens"] < MAX_TOKENS
    assert metric(admin_server.url, "vllm:kv_cache_usage_perc") == 0


def test_sleep_and_wake(admin_server: Server) -> None:
    """Requests that come while the engine sleeps at level 0 wait for it, and are answered."""

    async def sleep(client: httpx.AsyncClient) -> None:
        await post(client, "/sleep", params={"level": 0, "mode": "keep"})
        assert (await client.get("/is_sleeping")).json()["is_sleeping"]
        await asyncio.sleep(0.5)
        await post(client, "/wake_up")
        assert not (await client.get("/is_sleeping")).json()["is_sleeping"]

    alone, together = interrupted(admin_server, sleep)
    assert together == alone
