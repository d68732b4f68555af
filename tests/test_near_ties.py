"""The comparison of engines with the reference accepts near ties, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvllm.config import KvConfig
from kvllm.methods.base import Method, Window
from kvllm.methods.snapkv import SnapKV
from kvllm.reference import generate
from tests.near_ties import NUM_VARIANTS, check_greedy, with_score_noise
from tests.reference.models import VOCAB_SIZE, tiny_model

CONFIG = KvConfig(window_size=32, buffer_size=16, retention_ratio=0.5)
BLOCK_SIZE = 16
NUM_KEPT = 16
PROMPT = [(7 * i * i + 3 * i) % VOCAB_SIZE for i in range(20)]
NUM_TOKENS = 90  # one event, at 80 tokens, and as many as fit before the second

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class First(Method):
    """Keep the first tokens, but for one head: there the first that goes has the last that stays's score - `gap`."""

    gap: float = 0.0

    def score(self, window: Window) -> Tensor:
        indices = torch.arange(window.num_tokens, dtype=torch.float32)
        scores = (2 - indices / window.num_tokens).expand(window.positions.shape).clone()
        scores[0, 0, NUM_KEPT] = scores[0, 0, NUM_KEPT - 1] * (1 - self.gap)
        return scores


def answer(monkeypatch: pytest.MonkeyPatch, gap: float) -> list[int]:
    use(monkeypatch, First(gap))
    generation = generate(tiny_model("llama"), PROMPT, NUM_TOKENS, CONFIG, BLOCK_SIZE, ignore_eos=True)
    assert len(generation.kept) == 1
    return generation.token_ids


def use(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    monkeypatch.setattr("kvllm.reference.request.make_method", lambda config: method)


def check(output: list[int]) -> Any:
    return check_greedy(tiny_model("llama"), PROMPT, output, CONFIG, BLOCK_SIZE)


def test_same_survivors_need_no_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(answer(monkeypatch, 1e-6)).variant is None


@pytest.mark.parametrize("gap", [1e-6, -1e-6])
def test_other_survivor_of_a_near_tie(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    output = answer(monkeypatch, gap)
    use(monkeypatch, First(-gap))
    assert check(output).variant in range(NUM_VARIANTS)


@pytest.mark.parametrize("gap", [1e-4, -1e-4])
def test_other_survivor_where_there_was_no_tie(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    output = answer(monkeypatch, gap)
    use(monkeypatch, First(-gap))
    with pytest.raises(AssertionError, match="no near tie"):
        check(output)


def test_wrong_token_beside_a_near_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    output = answer(monkeypatch, 1e-6)
    use(monkeypatch, First(-1e-6))
    output[-1] = (output[-1] + 1) % VOCAB_SIZE
    with pytest.raises(AssertionError, match="no near tie"):
        check(output)


def test_equal_scores_stay_equal() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]).expand(1, 1, -1)
    for seed in range(NUM_VARIANTS):
        noisy = with_score_noise(SnapKV(num_observed=3), seed)
        assert isinstance(noisy, SnapKV) and noisy.num_observed == 3
        assert noisy.select(scores, 2).tolist() == [[[1, 2]]]
