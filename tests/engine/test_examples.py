"""The examples that need an engine, on the one that the tests share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("shared engine")]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))


def test_offline(shared_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import offline

    texts = offline.answer(shared_llm, ["Why?", "How?"], max_tokens=130)
    assert len(texts) == 2 and all(texts)
    printed = capsys.readouterr().out
    assert "windows compressed" in printed and not printed.startswith("0 ")


def test_rollouts_are_different_samples_of_one_prompt(shared_llm: Any) -> None:
    import rollouts

    samples = rollouts.rollouts(shared_llm, "One, two,", num_samples=4, max_tokens=130)
    assert len({text for text, _ in samples}) == 4 and all(logprob < 0 for _, logprob in samples)
    assert sys.modules["rollouts"].reward("It is 320 km.") == 1.0
