"""A server started by `kvllm serve` answers OpenAI's client, and vLLM's own metrics show the prefix cache at work."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server import kvllm_serve


@pytest.fixture(scope="module")
def base_url(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with kvllm_serve(model_dir, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Any:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=300)


def metric(base_url: str, name: str) -> float:
    with urllib.request.urlopen(f"{base_url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def test_chat_completion_and_streaming(client: Any) -> None:
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    chat = client.chat.completions.create(model="small", messages=messages, max_tokens=150, temperature=0)
    assert len(chat.choices[0].message.content) > 20
    plain = client.completions.create(
        model="small", prompt="Count: one, two, three,", max_tokens=200, temperature=0, extra_body={"ignore_eos": True}
    )
    assert plain.usage.completion_tokens == 200
    stream = client.completions.create(
        model="small", prompt="Count: one, two, three,", max_tokens=200, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text


def test_sixteen_at_once_with_an_abort_midway_and_prefix_hits(client: Any, base_url: str) -> None:
    prompt = "A long shared introduction. " * 30
    client.completions.create(model="small", prompt=prompt, max_tokens=1)
    hits = metric(base_url, "vllm:prefix_cache_hits_total")

    def ask(i: int) -> int:
        body = {"ignore_eos": True, "vllm_xargs": {"kv_retention_ratio": (0.5, 1.0)[i % 2]}}
        if i == 3:  # leaves in the middle
            stream = client.completions.create(
                model="small", prompt=prompt, max_tokens=200, stream=True, extra_body=body
            )
            next(iter(stream))
            stream.close()
            return 0
        answer = client.completions.create(model="small", prompt=f"{prompt}{i}", max_tokens=160, extra_body=body)
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(ask, range(16)))
    assert counts == [0 if i == 3 else 160 for i in range(16)]
    assert metric(base_url, "vllm:prefix_cache_hits_total") > hits
    deadline = time.monotonic() + 60
    while metric(base_url, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert metric(base_url, "vllm:num_requests_running") == 0
    assert metric(base_url, "vllm:kv_cache_usage_perc") == 0


def test_a_bad_ratio_is_a_bad_request(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="kv_retention_ratio=1.5"):
        client.completions.create(
            model="small", prompt="Hello", max_tokens=4, extra_body={"vllm_xargs": {"kv_retention_ratio": 1.5}}
        )
