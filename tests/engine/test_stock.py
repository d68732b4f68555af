"""Invariant 1: at retention 1.0, and before the first window closes, tokens are stock vLLM's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vllm import SamplingParams

from tests.engine.conftest import CONFIG, engine, words

PROMPTS = [words(n, seed=n) for n in (1, 16, 33, 200)]


def tokens(model_dir: Path, config: object, num_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    with engine(model_dir, config) as llm:  # type: ignore[arg-type]
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def test_ratio_one_and_the_time_before_the_first_window_are_stock(model_dir: Path) -> None:
    stock = tokens(model_dir, None, 200)
    assert tokens(model_dir, replace(CONFIG, retention_ratio=1.0), 200) == stock
    # The first event comes 96 tokens after the protected prompt, which is at most 31 tokens longer than the prompt.
    compressed = tokens(model_dir, CONFIG, 96)
    assert compressed == [s[:96] for s in stock]
