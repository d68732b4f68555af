"""benchmarks/kara_study.py: without options it is Kara, and its options do what they say."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from benchmarks import kara_study as study
from kvllm.measure.eval.traces import Trace, write_traces
from kvllm.methods import register
from kvllm.methods.base import Window
from kvllm.methods.kara import Kara
from tests.methods.windows import random_window
from tests.reference.models import text, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def registered(own_registry: None) -> None:
    register("study_kara")(study.StudyKara)


def window(num_tokens: int = 64) -> Window:
    return random_window(num_tokens=num_tokens, num_queries=16, head_dim=16)


def test_without_options_it_is_kara():
    seen = window()
    expected, found = Kara().compress(seen, 24), study.StudyKara().compress(seen, 24)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.keys, expected.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-5)


def output_error(**options: Any) -> float:
    """Of the window's own attention output to its stored queries, after compression."""
    seen = window()
    kept = study.StudyKara(lookahead=0, **options).compress(seen, 24)
    assert kept.keys is not None and kept.values is not None
    queries = seen.grouped_queries().flatten(2, 3) * 16**-0.5
    wanted = seen.logits().flatten(2, 3).softmax(-1) @ seen.values.transpose(1, 2)
    found = (queries @ kept.keys.transpose(1, 2).transpose(-1, -2)).softmax(-1) @ kept.values.transpose(1, 2)
    return float((found - wanted).square().mean())


def test_more_steps_fit_the_stored_queries_better_and_a_diagonal_sooner():
    errors = [output_error(steps=steps, value_ridge=0.01) for steps in (1, 4, 12)]
    assert errors[0] > errors[1] > errors[2]
    assert output_error(steps=2, value_ridge=0.01) < output_error(steps=2, value_ridge=0.01, precondition=False)


def test_four_bits_round_to_fifteen_levels_and_better_where_no_channel_stands_out():
    vectors = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    plain, rotated = study.four_bits(vectors), study.four_bits(vectors, rotated=True)
    steps = plain / (vectors.abs().amax(-1, keepdim=True) / 7)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.abs().amax() < 7.001 and len(steps.round().unique()) == 15
    assert float((plain - vectors).norm() / vectors.norm()) < 0.15
    vectors[:, 5] = 20.0
    plain, rotated = study.four_bits(vectors), study.four_bits(vectors, rotated=True)
    others = torch.arange(64) != 5
    assert (rotated - vectors)[:, others].norm() < 0.6 * (plain - vectors)[:, others].norm()
    with pytest.raises(ValueError, match="48 dimensions"):
        study.four_bits(vectors[:, :48], rotated=True)


def test_scores_and_refit_see_the_rounded_queries():
    seen = window()
    rounded = dataclasses.replace(seen, queries=study.four_bits(seen.queries, rotated=True))
    found = study.StudyKara(query_bits=4, rotate_queries=True).compress(seen, 24)
    expected, unrounded = (study.StudyKara().compress(w, 24) for w in (rounded, seen))
    assert torch.equal(found.indices, expected.indices)
    assert found.values is not None and expected.values is not None and unrounded.values is not None
    assert torch.equal(found.values, expected.values) and not torch.equal(found.values, unrounded.values)


def test_protected_tokens_are_kept_whatever_their_attention():
    seen = window()
    norms = seen.values.norm(dim=-1).transpose(1, 2)
    largest = norms.topk(12).indices.sort().values
    kept = study.StudyKara(protect_values=0.5, max_chunk_size=1).compress(seen, 24).indices
    plain = Kara(max_chunk_size=1).compress(seen, 24).indices
    assert all(
        set(a.tolist()) <= set(b.tolist()) for a, b in zip(largest.flatten(0, 1), kept.flatten(0, 1), strict=True)
    )
    assert any(
        not set(a.tolist()) <= set(b.tolist()) for a, b in zip(largest.flatten(0, 1), plain.flatten(0, 1), strict=True)
    )


def test_clusters_keep_all_of_the_mass():
    seen = window()
    kept = Kara().compress(seen, 24).indices
    mass = torch.rand(seen.keys.shape[0], seen.num_kv_heads, 64)
    growth, merged = study.clusters(seen, kept, mass)
    assert (growth >= 1 - 1e-5).all()
    own = mass.gather(-1, kept)
    torch.testing.assert_close((growth * own).sum(-1), mass.sum(-1), rtol=1e-4, atol=1e-4)
    total = (merged * (growth * own)[..., None]).sum(2)
    torch.testing.assert_close(total, (mass[..., None] * seen.values.transpose(1, 2)).sum(2), rtol=1e-3, atol=1e-3)


def test_the_loss_of_evicting_a_key_is_what_it_says():
    """Against one eviction done by hand."""
    seen = window(16)
    method = study.StudyKara(importance="loss")
    logits = seen.logits().flatten(2, 3)
    found = method.importances(seen, logits, method.query_weights(seen))
    values = seen.values.transpose(1, 2)
    without = logits.clone()
    without[..., 5] = -torch.inf
    change = without.softmax(-1) @ values - logits.softmax(-1) @ values
    torch.testing.assert_close(found[..., 5], change.square().sum(-1).mean(2).sqrt(), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("registered")
def test_every_variant_can_be_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "load_model", lambda *_: tiny_model("llama"))
    sizes = {"window_size": 64, "buffer_size": 16, "query_stride": 8}
    for entries in study.VARIANTS.values():
        for each in entries:
            monkeypatch.setitem(each, "window_size", sizes["window_size"])
            monkeypatch.setitem(each, "buffer_size", sizes["buffer_size"])
    write_traces(
        tmp_path / "traces.jsonl", [Trace("a", text(120), 13), Trace("b", text(140), 20), Trace("c", text(130), 9)]
    )
    study.main(
        tmp_path, tmp_path / "traces.jsonl", tmp_path / "out.json", variants=",".join(study.VARIANTS), config=[],
        ratio=0.5, half="train", limit=None, facts=0, seconds=60.0, device="cpu", dtype="float32",
    )  # fmt: skip
    results = json.loads((tmp_path / "out.json").read_text())["fidelity"]["results"]
    assert all(set(r["traces"]) == {"a", "c"} for r in results)
    names = [r["name"] for r in results]
    assert len(set(names)) == len(names) > 35 and all(0 <= r["kl"]["value"] < 10 for r in results)
    kl = {r["name"]: r["kl"]["value"] for r in results}
    assert len({round(v, 9) for v in kl.values()}) > 30  # the options change what is measured
    assert "| 0.5" in capsys.readouterr().out
