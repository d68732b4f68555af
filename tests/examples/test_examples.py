"""The examples that need no engine, with the small model; tests/engine has the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"window_size": 32, "buffer_size": 32, "retention_ratio": 0.5}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    licence = (EXAMPLES.parent / "LICENSE").read_text()
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"prompt": "The licence:\n", "answer": licence[200:620]}) + "\n")
    return file


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch, own_registry: None) -> None:
    """As where a script is started: its folder is on the path, and its method is known to it alone."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "new_method", raising=False)


def test_methods_are_compared_and_a_new_one_takes_part(model_dir: Path, texts: Path) -> None:
    import compare_methods
    import new_method

    from kvllm.methods import checked_config

    found = compare_methods.main([str(model_dir), str(texts), "long_values", "random"], **SIZES)
    assert set(found) == {"long_values", "random"}
    assert all(0 < kl < 20 and 0 <= same <= 1 for kl, same in found.values())
    assert found["long_values"] != found["random"]
    assert new_method.LongValues(recency=0.0) != new_method.LongValues()
    checked_config({"method": "long_values", "method_options": {"recency": 1.0}})


def test_a_text_that_is_too_short_is_refused(model_dir: Path, texts: Path) -> None:
    import compare_methods

    with pytest.raises(SystemExit, match=r"too short to be compressed; after its prompt it needs 65\d\.$"):
        compare_methods.main([str(model_dir), str(texts), "random"], window_size=512)


@pytest.mark.parametrize("script", ["offline", "request_ratios", "rollouts"])
def test_the_others_start_nothing_when_imported(script: str) -> None:
    """vLLM's processes import the script that started them."""
    __import__(script)
    assert callable(sys.modules[script].main)
