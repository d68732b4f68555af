"""Which messages the commands show that silence vLLM."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from kvllm.cli.quiet import CONFIG, CONFIGURED, QUIET, silence_vllm
from kvllm.engine import settings

LOG = f"""
import logging
import kvllm.__main__
for name in ("vllm.v1.engine.core", {settings.logger.name!r}):
    for level in ("INFO", "WARNING", "ERROR"):
        logging.getLogger(name).log(logging.getLevelName(level), "%s %s", name, level)
"""


def test_our_warnings_are_seen_and_of_vllm_only_errors() -> None:
    """From the start of a process that a silenced command starts, before vLLM reads the file there."""
    silence_vllm()
    made = subprocess.run([sys.executable, "-c", LOG], capture_output=True, text=True, check=True)
    theirs, *ours = made.stderr.splitlines()
    assert made.stdout == ""
    assert theirs.startswith("(MainProcess pid=") and theirs.endswith("vllm.v1.engine.core ERROR")
    assert ours == [f"{level}: {settings.logger.name} {level}" for level in ("WARNING", "ERROR")]


def test_vllm_takes_the_file_from_the_environment() -> None:
    from vllm.config.logging import LoggingConfig

    silence_vllm(["--dtype", "float32"])
    config = LoggingConfig()
    assert config.configure_logging and config.pylogging_config_file == str(CONFIG)


@pytest.mark.parametrize(
    "environment, arguments",
    [
        *(({name: value}, []) for name, value in zip(CONFIGURED, ("DEBUG", "ext://sys.stdout", "f", "0"), strict=True)),
        ({}, ["--log-level", "INFO"]),
        ({}, ["--logging_config.log_level=INFO"]),
        ({}, ["--log-config-file", "f.json"]),
    ],
)
def test_a_log_that_the_user_configures_stays(
    environment: dict[str, str], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    level = logging.getLogger("vllm").level
    silence_vllm(arguments)
    assert logging.getLogger("vllm").level == level
    assert os.environ.get("VLLM_LOGGING_CONFIG_PATH") == environment.get("VLLM_LOGGING_CONFIG_PATH")
    assert {name: os.environ[name] for name in QUIET} == QUIET | {n: v for n, v in environment.items() if n in QUIET}


def test_doctor_silences_vllm_before_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from kvllm.cli import doctor
    from kvllm.cli.app import app

    seen: dict[str, Any] = {}
    monkeypatch.setattr(doctor, "examine", lambda *_: seen.update(os.environ) or [])
    CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert seen["VLLM_LOGGING_CONFIG_PATH"] == str(CONFIG)
