"""How commands start vLLM's offline engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvllm.cli.offline import start_llm
from kvllm.cli.quiet import QUIET
from kvllm.errors import UsageError


def start(model_dir: Path, monkeypatch: pytest.MonkeyPatch, made: Any, **options: Any) -> Any:
    """`start_llm` with `made(args)` in the place of vLLM's start."""
    from vllm import LLM

    monkeypatch.setattr(LLM, "from_engine_args", made)
    return start_llm([str(model_dir)], {"retention_ratio": 0.5}, Console(quiet=True), **options)


@pytest.mark.parametrize("in_process, multiprocessing", [(True, "0"), (False, None)])
def test_vllm_keeps_quiet_unless_it_is_told_otherwise(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, in_process: bool, multiprocessing: str | None
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    args = start(model_dir, monkeypatch, lambda args: args, in_process=in_process)
    assert args.additional_config["kvllm"]["retention_ratio"] == 0.5
    assert {name: os.environ[name] for name in QUIET} == QUIET | {"VLLM_LOGGING_LEVEL": "DEBUG"}
    assert os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == multiprocessing


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("too little\n memory"), "the engine refused to start: too little memory$"),
        (
            RuntimeError("Engine core initialization failed. See root cause above."),
            "the engine did not start; see the first error in vLLM's messages above",
        ),
        (
            Exception("WorkerProc initialization failed due to an exception in a background process."),
            "the engine did not start; see the first error in vLLM's messages above",
        ),
    ],
)
def test_an_engine_that_does_not_start_is_one_line(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(args: Any) -> None:
        raise error

    with pytest.raises(UsageError, match=words):
        start(model_dir, monkeypatch, fail)


def test_other_errors_keep_their_traceback(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> None:
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="^CUDA error$"):
        start(model_dir, monkeypatch, fail)
