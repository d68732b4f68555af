"""Requests that schemathesis derives from the server's own OpenAPI schema: no 5xx, no hang, the server goes on."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.robustness import examples
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

# What our own code sees; the rest of vLLM's endpoints is the same with and without compression.
PATHS = ["/v1/completions", "/v1/chat/completions"]
SECONDS = 60  # for one answer
SHORT = 3  # tokens: the subject is what is accepted, not the answer


@pytest.mark.parametrize("path", PATHS)
def test_requests_of_the_schema(server: Server, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path]["POST"]
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=examples(10, 3_000), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy())
    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body |= {"model": "small", "max_tokens": SHORT, "n": 1}
            for key in ("max_completion_tokens", "min_tokens", "best_of", "use_beam_search"):
                case.body.pop(key, None)
        response = case.call(timeout=SECONDS)
        statuses[response.status_code] += 1
        assert response.status_code < 500, (
            f"{json.dumps(case.body)[:1500]}: {response.status_code} {response.text[:500]}"
        )

    ask()
    print(f"schema: {path}: {dict(statuses)}")
    assert sum(statuses.values()) >= examples(5, 1_000)
    with urllib.request.urlopen(f"{server.url}/health", timeout=10) as response:
        assert response.status == 200
