"""Thousands of requests that arrive, are cut off and preempt one another: each finished answer is the one given alone.

Long form: 10,000 requests (or KVLLM_SOAK=N), a server of its own with a pool of a few requests and priorities. Short
form: 12, and the server of the other tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.models import save_small_chat_model
from tests.processes import descendants, resident_bytes
from tests.robustness import LONG, examples
from tests.server import Server, kvllm_serve, metric

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

NUM_KINDS = examples(4, 48)  # distinct requests; each is asked many times
NUM_REQUESTS = examples(12, int(os.environ.get("KVLLM_SOAK", "10000")))
LENGTHS = [20, 60, 120, 200, 320] if LONG else [20, 120]
AT_ONCE = 24  # above the server's 8 seats, so requests queue
POOL_BLOCKS = 21  # of 32 tokens: the longest request needs 9 to 17 of them, by its ratio
# oneDNN compiles a kernel for each number of tokens in a step and keeps the newest 1,024, so the worker grows for
# thousands of requests, without compression as well: over 1,500 requests of this test from 989 to 1,213 MiB with stock
# vLLM, from 972 to 1,193 MiB with KvLLM. With the newest 32 it grew from 890 to 899 MiB.
KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32"
# Bytes that a process may grow by after the first tenth. Stock vLLM's worker grows by some 2 MiB in 1,000 requests, and
# so did ours, by 16 in 9,000; another KiB a request would be too much.
GROWTH = 24 * 2**20


@pytest.fixture
def soaked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not LONG:
        yield request.getfixturevalue("server")
        return
    folder = save_small_chat_model(tmp_path_factory.mktemp("model"))
    arguments = [
        "--scheduling-policy", "priority", "--num-gpu-blocks-override", str(POOL_BLOCKS), "--max-num-seqs", "8",
        "--max-model-len", "512",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*KERNEL_CACHE)
        with kvllm_serve(folder, tmp_path_factory.mktemp("server") / "log", *arguments) as server:
            yield server


def kinds() -> list[dict[str, Any]]:
    """Requests of all sorts: a third share a long beginning; ratios, methods, lengths and stop strings are mixed."""
    draw = random.Random(7)
    shared = [f"w{draw.randrange(2048)}" for _ in range(96)]
    made = []
    for i in range(NUM_KINDS):
        own = [f"w{draw.randrange(2048)}" for _ in range(draw.randint(3, 60))]
        body: dict[str, Any] = {
            "model": "small", "prompt": " ".join(shared + own if i % 3 == 0 else own), "temperature": 0,
            "max_tokens": draw.choice(LENGTHS), "ignore_eos": True,
        }  # fmt: skip
        if (ratio := draw.choice([None, None, 0.5, 0.6, 0.75, 1.0])) is not None:
            body["vllm_xargs"] = {"kv_retention_ratio": ratio}
        if i % 4 == 3:
            body["vllm_xargs"] = {**body.get("vllm_xargs", {}), "kv_method": "random"}
        if i % 4 == 1:
            body["stop"] = [f"w{draw.randrange(2048)}" for _ in range(2)] + ["w1", "w77"]
        made.append(body)
    return made


async def ask(client: httpx.AsyncClient, body: dict[str, Any], cut_after: int | None = None) -> str | None:
    """The streamed answer; None if the client went away after that many chunks."""
    pieces: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            raise AssertionError(f"{body}: HTTP {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return "".join(pieces)
            if line.startswith("data: "):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                pieces += [choice["text"] for choice in chunk["choices"]]
                if cut_after is not None and len(pieces) > cut_after:
                    return None
    raise AssertionError("the stream ended without [DONE]")


def test_soak(soaked: Server) -> None:
    bodies, draw, counts = kinds(), random.Random(11), Counter[str]()
    processes = descendants(soaked.process.pid) | {soaked.process.pid: "API server"}
    wrong: list[str] = []

    async def run() -> list[dict[int, int]]:
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=soaked.url, timeout=300, limits=limits) as client:
            alone = [await ask(client, body) for body in bodies]
            assert len(set(alone)) > len(bodies) // 2  # they tell requests apart
            seats = asyncio.Semaphore(AT_ONCE)
            sizes: list[dict[int, int]] = []  # after each tenth

            async def one(number: int) -> None:
                kind = draw.randrange(len(bodies))
                body = bodies[kind] | ({"priority": draw.randint(-2, 2)} if LONG else {})
                cut_after = draw.randrange(1, 150) if draw.random() < 0.15 else None
                async with seats:
                    answer = await ask(client, body, cut_after)
                counts["cut off" if answer is None else "answered"] += 1
                if counts.total() % (NUM_REQUESTS // 10) == 0:
                    sizes.append(resident_bytes(processes))
                if answer is not None and answer != alone[kind]:
                    wrong.append(f"request {number}, kind {kind}: {answer[:80]!r}, alone {str(alone[kind])[:80]!r}")

            await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))
            return sizes

    sizes = asyncio.run(run())
    deadline = time.monotonic() + 30  # the last client that went away may not have been noticed yet
    while metric(soaked.url, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert metric(soaked.url, "vllm:kv_cache_usage_perc") == 0, "blocks are still held"
    counts["preemptions"] = int(metric(soaked.url, "vllm:num_preemptions_total"))
    counts["windows"] = int(metric(soaked.url, "kvllm:windows_compressed_total"))
    print(f"soak: {dict(counts)}")
    for pid, name in processes.items():
        print(f"soak: {name[:40]}: MiB after each tenth: {[each[pid] >> 20 for each in sizes]}")
    assert not wrong, f"{len(wrong)} of {counts['answered']} answers differ: {wrong[:3]}"
    assert counts["answered"] + counts["cut off"] == NUM_REQUESTS
    assert counts["windows"] > 0
    if LONG:
        assert counts["preemptions"] and counts["cut off"] > NUM_REQUESTS // 20
        grown = {processes[pid][:40]: sizes[-1][pid] - sizes[0][pid] for pid in processes}
        assert all(growth < GROWTH for growth in grown.values()), grown
