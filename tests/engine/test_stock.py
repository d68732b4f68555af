"""Invariant 1: at retention 1.0, and before the first window closes, tokens are stock vLLM's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.conftest import group_resources
from tests.engine.conftest import CONFIG, SHARED, engine, words

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("shared engine")]

NUM_TOKENS = 140  # past the first event, which comes 96 to 127 tokens after a prompt
PROMPTS = [words(n, seed=n) for n in (1, 16, 33, 200)]


def tokens(llm: Any, num_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def test_ratio_one_and_the_time_before_the_first_window_are_stock(shared_llm: Any, model_dir: Path) -> None:
    # The first event comes 96 tokens after the protected prompt, which is at most 31 tokens longer than the prompt.
    compressed = tokens(shared_llm, 96)
    group_resources.close()  # two engines in a process would share vLLM's process groups
    with engine(model_dir, None, **SHARED) as llm:
        stock = tokens(llm, NUM_TOKENS)
    with engine(model_dir, replace(CONFIG, retention_ratio=1.0), **SHARED) as llm:
        assert tokens(llm, NUM_TOKENS) == stock
    assert compressed == [s[:96] for s in stock]
