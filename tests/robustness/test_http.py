"""Random requests get an answer or HTTP 400, never a 5xx, and the server goes on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.robustness import examples
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

values = st.one_of(
    st.floats(), st.integers(-5, 5), st.sampled_from([0.5, 0.6, 0.75, 1.0, 1, 10**400, True]), st.text(max_size=5),
    st.just("random"), st.none(), st.lists(st.floats(allow_nan=False), max_size=2),
)  # fmt: skip
keys = st.sampled_from(["kv_retention_ratio", "kv_method", "kv_usage", "kv_usages", "kv_", "other"])
bodies = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["Hello", "", [1, 2, 3], " word" * 200, ["one", "two"], [], 7])},
    optional={
        "max_tokens": st.sampled_from([0, 1, 3, -1, 10**9, "many"]),
        "min_tokens": st.sampled_from([0, 2, 10**6]),
        "n": st.sampled_from([1, 2, 0]),
        "stop": st.sampled_from(["e", ["e", "t"], "", 5]),
        "stream": st.booleans(),
        "stream_options": st.sampled_from([{"include_usage": True}, {}]),
        "temperature": st.sampled_from([0, 0.7, -1, 99]),
        "kv_retention_ratio": st.just(0.5),
        "vllm_xargs": st.dictionaries(keys, values, max_size=3),
    },
)


def post(url: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({"model": "small", "max_tokens": 2} | body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def test_random_requests(server: Server) -> None:
    statuses: dict[int, int] = {}

    @settings(
        max_examples=examples(40, 3_000), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(bodies)
    def ask(body: dict[str, Any]) -> None:
        status, answer = post(server.url, body)
        statuses[status] = statuses.get(status, 0) + 1
        assert status in (200, 400, 422), f"{body}: HTTP {status}: {answer[:500]}"
        if status != 200:
            assert json.loads(answer)["error"]["message"]

    ask()
    assert statuses.get(200) and statuses.get(400), statuses
    status, answer = post(server.url, {"prompt": "Hello", "max_tokens": 150, "ignore_eos": True, "temperature": 0})
    assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 150
    with urllib.request.urlopen(f"{server.url}/health", timeout=10) as response:
        assert response.status == 200
