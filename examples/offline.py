"""Offline generation with a compressed KV cache: `python examples/offline.py MODEL`."""

from __future__ import annotations

import sys
from typing import Any

QUESTIONS = ["Explain how a computer adds two numbers.", "Why do we have seasons?", "How do vaccines work?"]


def answer(llm: Any, questions: list[str], max_tokens: int) -> list[str]:
    """One answer per prompt; prints the compression statistics."""
    from vllm import SamplingParams

    from kvllm.engine.stats import engine_stats

    outputs = llm.generate(questions, SamplingParams(temperature=0.7, seed=0, max_tokens=max_tokens, ignore_eos=True))
    stats = engine_stats(llm)
    print(
        f"{stats['num_windows_compressed']} windows compressed, {stats['num_tokens_evicted']} tokens evicted; "
        f"at most {stats['peak_kv_blocks']} of {stats['num_kv_blocks']} blocks were in use."
    )
    return [output.outputs[0].text for output in outputs]


def main() -> None:
    from vllm import LLM

    # vLLM loads KvLLM through its entry point; this key enables it.
    llm = LLM(sys.argv[1], max_model_len=4096, additional_config={"kvllm": {"retention_ratio": 0.3}})
    for text in answer(llm, QUESTIONS, max_tokens=1024):
        print(text[:300], "...\n")


if __name__ == "__main__":  # vLLM's worker processes import this file
    main()
