"""benchmarks/rounding_study.py: its plain variant is what the compressor does, and the others do what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import rounding_study as study
from kvllm.compression.compressor import rounded
from kvllm.compression.rounding import Rounding
from kvllm.measure.eval import fidelity
from kvllm.measure.eval.traces import Trace, write_traces
from kvllm.methods import register
from kvllm.methods.base import Window
from kvllm.methods.kara import Kara
from tests.methods.windows import random_window
from tests.reference.models import text, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def registered(own_registry: None) -> None:
    register("rounded_kara")(study.RoundedKara)


def window(num_tokens: int = 64) -> Window:
    return random_window(num_tokens=num_tokens, num_queries=16, head_dim=16)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_plain_variant_is_what_the_compressor_does(bits):
    seen = window()
    expected = rounded(seen, Kara().compress(seen, 40).gathered(seen.keys, seen.values), Rounding(bits, 24))
    found = study.RoundedKara(key_bits=bits, value_bits=bits, group=24).compress(seen, 40)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.keys, expected.keys, rtol=0, atol=0)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0)


def test_16_bits_are_not_rounded():
    seen = window()
    expected, found = Kara().compress(seen, 40), study.RoundedKara(key_bits=16, value_bits=16).compress(seen, 40)
    assert found.keys is not None and found.values is not None
    assert expected.keys is not None and expected.values is not None
    assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("bits", [2, 4])
def test_more_refitting_leaves_less_error(bits, dim):
    x = torch.randn(2, 56, 3, 64, generator=torch.Generator().manual_seed(0)) ** 3  # heavy tails
    error = [
        (study.RoundedKara(fit=fit).round_trip(x, dim, bits) - x).square().sum(dim)
        for fit in ("range", "shrink", "least_squares")
    ]
    assert (error[0] >= error[1]).all() and (error[1] >= error[2]).all()
    assert error[2].sum() < 0.9 * error[0].sum()


def test_exact_scales_differ_from_stored_ones_by_their_rounding_to_bfloat16():
    x = torch.randn(2, 56, 3, 64, generator=torch.Generator().manual_seed(0)) + 10
    exact, stored = (study.RoundedKara(fit=fit).round_trip(x, 1, 4) for fit in ("exact_scales", "range"))
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 15
    assert ((exact - x).abs() <= step / 2 * (1 + 1e-3)).all()
    assert ((stored - x).abs() > step / 2 * (1 + 1e-3)).any() and ((stored - exact).abs() <= 1.3 * step).all()


def test_groups_of_channels_round_values_apart():
    x = torch.randn(1, 1, 8, 32, generator=torch.Generator().manual_seed(0))
    method = study.RoundedKara(value_group=16)
    halves = [study.RoundedKara().rounded_values(x[..., half]) for half in (slice(16), slice(16, 32))]
    assert torch.equal(method.rounded_values(x), torch.cat(halves, dim=-1))


def test_values_refitted_to_rounded_keys_restore_more_of_the_windows_output():
    """In 2 bits keys are so wrong that it shows; values are not rounded, to see the refit alone."""
    seen = window()
    options: dict[str, Any] = {"key_bits": 2, "value_bits": 16, "group": 32, "value_ridge": 0.01, "lookahead": 0}
    logits = seen.logits().flatten(2, 3)
    wanted = logits.softmax(-1) @ seen.values.transpose(1, 2)
    error = {}
    for refit in ("none", "before", "after"):
        kept = study.RoundedKara(refit=refit, **options).compress(seen, 32)
        assert kept.keys is not None and kept.values is not None
        keys, values = kept.keys.transpose(1, 2), kept.values.transpose(1, 2)
        queries = seen.grouped_queries().flatten(2, 3) * 16**-0.5
        error[refit] = ((queries @ keys.transpose(-1, -2)).softmax(-1) @ values - wanted).square().mean()
    assert error["after"] < 0.7 * error["before"] and error["after"] < error["none"]


@pytest.mark.usefixtures("registered")
def test_every_variant_can_be_measured():
    """On windows of 64 tokens, which keep the same shares."""
    chosen = study.study_cases(",".join(study.VARIANTS), [])
    assert len({case.name for case in chosen}) == len(chosen) > 40
    sizes = {"window_size": 64, "buffer_size": 16, "query_stride": 8}
    small = [type(c)(c.name, type(c.config).from_dict(c.config.to_dict() | sizes)) for c in chosen]
    small = [c for c in small if "value_group" not in c.name]  # the tiny model's heads have 16 channels
    results = fidelity.measure(tiny_model("llama"), [Trace("a", text(120), 13)], small, block_size=4)
    loss = {r.case.name: r.estimate("kl").value for r in results}
    assert all(0 <= kl < 10 for kl in loss.values())
    plain = next(name for name in loss if name.startswith("224 ") and "key_bits=16 value_bits=16" in name)
    four, two = (next(n for n in loss if n.startswith("224 ") and bits in n) for bits in ("fit=shrink", "key_bits=2"))
    assert loss[plain] < loss[four] < loss[two]


@pytest.mark.usefixtures("registered")
def test_the_command_writes_figures_for_each_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "load_model", lambda *_: tiny_model("llama"))
    write_traces(
        tmp_path / "traces.jsonl", [Trace("a", text(120), 13), Trace("b", text(140), 20), Trace("c", text(120), 9)]
    )
    config = json.dumps(
        {"window_size": 64, "buffer_size": 16, "retention_ratio": [0.5, 0.75], "survivor_bits": [16, 4]}
    )
    study.main(
        tmp_path, tmp_path / "traces.jsonl", tmp_path / "out.json", variants="", config=[config], block_size=16,
        device="cpu", dtype="float32",
    )  # fmt: skip
    written = json.loads((tmp_path / "out.json").read_text())
    assert [r["config"]["survivor_bits"] for r in written["results"]] == [16, 4, 16, 4]
    assert all(set(r["traces"]) == {"a", "c"} for r in written["results"])  # the train half
    assert "survivor_bits=4" in capsys.readouterr().out
