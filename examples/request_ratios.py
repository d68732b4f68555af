"""Set the retention ratio per request, with the openai client.

kvllm serve MODEL --retention-ratio 0.3 --request-ratios 0.2-0.5,1.0
python examples/request_ratios.py --base-url http://localhost:8000/v1
"""

from __future__ import annotations

import argparse
from typing import Any


def ask(client: Any, model: str, question: str, ratio: float, max_tokens: int) -> dict[str, Any]:
    """The answer's final KV cache statistics: `kept_tokens`, `evicted_tokens` and `compressions`.

    ratio: 1.0 is the full cache. The server rejects ratios that it does not allow with HTTP 400.
    """
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        extra_body={"ignore_eos": True, "vllm_xargs": {"kv_retention_ratio": ratio, "kv_usage": True}},
    )
    usage: dict[str, Any] = answer.usage.model_extra["kv_cache"]
    return usage


def main() -> None:
    import openai

    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5, 1.0])
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.base_url, api_key="none")
    model = client.models.list().data[0].id
    for ratio in arguments.ratios:
        usage = ask(client, model, "Explain in detail how a computer multiplies.", ratio, max_tokens=1024)
        print(f"ratio {ratio}: {usage}")


if __name__ == "__main__":
    main()
