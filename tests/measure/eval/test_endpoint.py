from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvllm.measure.eval.engines import Completion, Endpoint, Question, Sampling

pytest.importorskip("openai")


class Server(BaseHTTPRequestHandler):
    """Chat completions that repeat the prompt."""

    requests: list[dict] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.requests.append(body)
        message = {"role": "assistant", "content": body["messages"][0]["content"].upper(), "reasoning": "hm. "}
        answer = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
        }  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        pass


def test_an_endpoint_is_asked_with_the_ratio_of_each_request():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        endpoint = Endpoint(url, "tiny", Sampling(max_tokens=9, temperature=0.5, top_p=0.9), concurrency=2)
        answers = dict(endpoint.answer([Question("a", 0.3, 5), Question("b", None, None), Question("c", 1.0, 6)]))
        endpoint.close()
    finally:
        server.shutdown()
        server.server_close()
    assert answers == {i: Completion(f"hm. {c}", 7, "stop") for i, c in enumerate("ABC")}
    asked = {r["messages"][0]["content"]: r for r in Server.requests}
    assert asked["a"]["vllm_xargs"] == {"kv_retention_ratio": 0.3} and asked["a"]["seed"] == 5
    assert "vllm_xargs" not in asked["b"] and asked["b"].get("seed") is None
    assert asked["c"]["max_tokens"] == 9 and asked["c"]["temperature"] == 0.5 and asked["c"]["top_p"] == 0.9
