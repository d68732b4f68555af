"""Model families against the reference, as docs/compatibility.md has them."""

from __future__ import annotations

import os

import pytest

from kvllm.support import model_reasons
from tests.engine.families import (
    FAMILIES,
    MAX_MODEL_LEN,
    ON_EVERY_RUN,
    OUTCOMES,
    PAGE,
    page,
    recorded,
    try_family,
)

RESULTS, VERSIONS = recorded()
WANTED = FAMILIES if os.environ.get("KVLLM_ALL_FAMILIES") else ON_EVERY_RUN


@pytest.mark.engine
@pytest.mark.parametrize("name", WANTED)
def test_a_family_does_what_is_recorded(name: str) -> None:
    result = try_family(FAMILIES[name])
    assert (result.outcome, result.options) == (RESULTS[name].outcome, RESULTS[name].options), result.detail
    if result.outcome == "refused":
        assert result.detail == RESULTS[name].detail


def test_every_family_was_tried_and_none_differs_from_the_reference() -> None:
    assert list(RESULTS) == list(FAMILIES)
    assert {result.outcome for result in RESULTS.values()} <= set(OUTCOMES)
    assert not [name for name, result in RESULTS.items() if result.outcome == "differs"]
    assert sum(result.outcome == "equal" for result in RESULTS.values()) >= 20


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_alone_refuses_nothing_that_is_served(name: str) -> None:
    reasons = model_reasons(FAMILIES[name].config(), MAX_MODEL_LEN)
    if RESULTS[name].outcome in ("equal", "no reference"):
        assert reasons == []
    elif reasons and RESULTS[name].outcome == "refused":
        assert reasons[0] in RESULTS[name].detail


def test_the_page_says_what_was_recorded_and_what_is_refused_today() -> None:
    """After a change run `python -m tests.engine.families`, with the names of those that changed."""
    assert PAGE.read_text() == page(RESULTS, VERSIONS)
