"""Where kvllm-measure is missing, its commands are listed as missing and say what to install."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner

import kvllm
from kvllm.__main__ import app
from kvllm.cli import measuring
from kvllm.errors import UsageError


def installed(version: str | None) -> Callable[[str], str]:
    def look(name: str) -> str:
        if version is None or name != "kvllm-measure":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return look


def summaries(app: typer.Typer) -> dict[str, str]:
    """The first line of help of each command and group."""
    group = typer.main.get_group(app)
    return {name: (command.help or "").partition("\n")[0] for name, command in group.commands.items()}


def test_stand_ins_are_the_commands_of_the_package() -> None:
    from kvllm.measure.commands import add_commands

    real = typer.Typer()
    add_commands(real)
    assert summaries(real) == measuring.COMMANDS
    assert measuring.COMMANDS.items() <= summaries(app).items()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["throughput", "m", "--json", "out.json"]])
@pytest.mark.parametrize("name", measuring.COMMANDS)
def test_a_stand_in_refuses_whatever_its_arguments(name: str, arguments: list[str]) -> None:
    app = typer.Typer()
    measuring.add_stand_ins(app, "not here; install it")
    with pytest.raises(UsageError, match=f"^kvllm {name}: not here; install it.$"):
        app([name, *arguments], standalone_mode=False)
    listed = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["--help"]).stdout
    assert "Not installed; the extra 'measure' adds" in listed and measuring.COMMANDS[name] in listed


@pytest.mark.parametrize("version", [None, kvllm.__version__])
def test_the_code_alone_is_enough(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """None: a development install."""
    monkeypatch.setattr("importlib.metadata.version", installed(version))
    assert measuring.why_missing() is None


def test_a_leftover_folder_is_not_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", installed(None))
    for found in (None, importlib.machinery.ModuleSpec("kvllm.measure", loader=None, is_package=True)):
        monkeypatch.setattr(measuring, "find_spec", lambda name, found=found: found)
        why = measuring.why_missing()
        assert why and "needs the package kvllm-measure, not installed here" in why and measuring.INSTALL in why


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code may not fit, and must not keep `kvllm serve` from starting."""
    monkeypatch.setattr("importlib.metadata.version", installed("0.0.9"))
    why = measuring.why_missing()
    assert why and why.startswith(f"kvllm-measure 0.0.9 does not fit kvllm {kvllm.__version__}; install the same")
