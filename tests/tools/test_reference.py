"""The pages that are written from the source are current, and every refusal has a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import reference, refusals


@pytest.mark.parametrize("module", [reference, refusals], ids=["commands.md", "refusals.md"])
def test_the_page_is_current(module: object) -> None:
    page: Path = module.PAGE  # type: ignore[attr-defined]
    assert page.read_text() == module.page(), "run `make reference`"  # type: ignore[attr-defined]


def test_every_refusal_has_a_remedy() -> None:
    without = [f"{each.path}: {each.text}" for each in refusals.refusals() if not refusals.remedy(each)]
    assert not without, "say in the message what to do instead, or add it to REMEDIES in tools/refusals.py"


def test_every_remedy_is_of_a_refusal() -> None:
    found = refusals.refusals()
    unused = [key for key in refusals.REMEDIES if not any(key[0] == r.path and key[1] in r.text for r in found)]
    assert not unused


def test_refusals_are_found_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "support.py").write_text(
        """
WHY = "it cannot be served"
def check(x):
    reason("field", x, WHY)
    raise UsageError(f"x={x}: too " "large; use less.")
def packed_problem():
    return f"bits={1}: use 4."
ROWS = [(True, "backend", 1, f"use one of {2}")]
"""
    )
    monkeypatch.setattr(refusals, "SOURCE", tmp_path)
    found = {each.text: refusals.remedy(each) for each in refusals.refusals()}
    assert found == {
        "field=…: it cannot be served": refusals.STOCK,
        "x=…: too large; use less.": "Use less.",
        "bits=…: use 4.": "Use 4.",
        "backend=…: use one of …": "Use one of …",
    }
