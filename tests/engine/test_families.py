"""Model families against the reference, as recorded in docs/compatibility.md."""

from __future__ import annotations

import os

import pytest
import transformers
from vllm.version import __version__ as vllm_version

from kvllm.support import model_reasons
from tests.engine import architectures
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


def test_the_page_has_every_architecture_that_vllm_has_of_those_with_a_config() -> None:
    if (VERSIONS["vllm"], VERSIONS["transformers"]) == (vllm_version.partition("+")[0], transformers.__version__):
        assert architectures.recorded() == architectures.known()
    listed = PAGE.read_text().partition("# Architectures")[2]
    assert listed.count("| served | equal |") >= 20 and listed.count("| refused: ") >= 10
    assert "| `LlamaForCausalLM` | served | equal | equal |" in listed


@pytest.mark.parametrize("name", architectures.ON_GPU)
def test_the_gpu_test_of_an_architecture_is_there(name: str) -> None:
    text = (PAGE.parents[1] / "tests" / "gpu" / architectures.ON_GPU[name]).read_text()
    assert name.removesuffix("ForCausalLM").lower() in text.lower()


def test_the_page_says_what_was_recorded_and_what_is_refused_today() -> None:
    """After a change run `python -m tests.engine.families`, with the names of those that changed."""
    assert PAGE.read_text() == page(RESULTS, VERSIONS)
