"""Requests that schemathesis derives from the server's own OpenAPI schema: no 5xx, no hang, the server goes on."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.robustness import examples
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

# What our own code sees; the rest of vLLM's endpoints is the same with and without compression.
PATHS = ["/v1/completions", "/v1/chat/completions"]
GOOD: dict[str, dict[str, Any]] = {
    PATHS[0]: {"prompt": "Hello"},
    PATHS[1]: {"messages": [{"role": "user", "content": "Hello"}]},
}
SECONDS = 60  # for one answer
SHORT = 3  # tokens: the subject is what is accepted, not the answer


def numbers_in(value: Any) -> list[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in numbers_in(each)]
    return [value] if isinstance(value, int) else []


def without_vllm_faults(body: dict[str, Any]) -> dict[str, Any]:
    """`body` without what vLLM 0.32 answers with HTTP 500, compressed or not: integers beyond 64 bits in
    `repetition_detection` (OverflowError: can't serialize ints). In other fields it refuses them with 400.
    """
    beyond = any(not -(2**63) <= number < 2**63 for number in numbers_in(body.get("repetition_detection")))
    return {key: value for key, value in body.items() if not (beyond and key == "repetition_detection")}


@pytest.mark.parametrize("path", PATHS)
def test_requests_of_the_schema(server: Server, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path]["POST"]
    statuses: Counter[int] = Counter()
    failed: list[str] = []  # the run goes on: the next one may be another fault

    @settings(
        max_examples=examples(10, 3_000), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(), st.randoms(use_true_random=False))
    def ask(case: Any, draw: Any) -> None:
        if isinstance(case.body, dict):  # with all of its options at once, hardly any request is valid
            optional = sorted(set(case.body) - {"prompt", "messages"})
            for key in optional if not draw.randrange(4) else draw.sample(optional, max(0, len(optional) - 2)):
                del case.body[key]
            case.body |= {"model": "small", "max_tokens": SHORT, "n": 1}
            if draw.random() < 0.8:
                case.body |= GOOD[path]
            case.body = without_vllm_faults(case.body)
        response = case.call(timeout=SECONDS)
        statuses[response.status_code] += 1
        if response.status_code >= 500:
            failed.append(f"{json.dumps(case.body)}: {response.status_code} {response.text[:500]}")

    ask()
    print(f"schema: {path}: {dict(statuses)}")
    assert not failed, f"{len(failed)}, the shortest: {min(failed, key=len)[:2000]}"
    assert sum(statuses.values()) >= examples(5, 1_000)
    with urllib.request.urlopen(f"{server.url}/health", timeout=10) as response:
        assert response.status == 200
