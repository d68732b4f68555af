"""Draw many samples of one prompt, as in reinforcement learning: `python examples/rollouts.py MODEL`.

The samples share the blocks of the prompt, which is not compressed. Each answer is compressed separately, so more of
them run at once in the same memory. The behaviour policy is then the compressed model: use its log-probabilities, which
this script prints.
"""

from __future__ import annotations

import sys
from typing import Any

PROMPT = (
    "Question: A train travels 120 km in 1.5 hours. How far does it travel in 4 hours? Think step by step.\nAnswer:"
)


def rollouts(llm: Any, prompt: str, num_samples: int, max_tokens: int) -> list[tuple[str, float]]:
    """Each sample and the sum of its log-probabilities under the compressed model."""
    from vllm import SamplingParams

    params = SamplingParams(n=num_samples, temperature=1.0, seed=0, max_tokens=max_tokens, logprobs=0)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return [(sample.text, sample.cumulative_logprob) for sample in output.outputs]


def reward(text: str) -> float:
    return float("320" in text)


def main() -> None:
    from vllm import LLM

    from kvllm.engine.stats import engine_stats

    llm = LLM(sys.argv[1], max_model_len=4096, additional_config={"kvllm": {"retention_ratio": 0.3}})
    samples = rollouts(llm, PROMPT, num_samples=16, max_tokens=1024)
    rewards = [reward(text) for text, _ in samples]
    baseline = sum(rewards) / len(rewards)
    for (text, logprob), own in zip(samples, rewards, strict=True):
        print(f"advantage {own - baseline:+.2f}  log-probability {logprob:8.1f}  {text[:60]!r}")
    stats = engine_stats(llm)
    print(f"mean reward {baseline:.2f}; at most {stats['peak_kv_blocks']} KV blocks in use")


if __name__ == "__main__":  # vLLM's worker processes import this file
    main()
