from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kvllm.cli import app
from kvllm.measure.eval.cli import COMMANDS


@pytest.mark.parametrize("name", [name for name in COMMANDS])
def test_every_measurement_shows_its_own_options(name, capsys):
    result = CliRunner().invoke(app, ["eval", name, "--help"])
    assert result.exit_code == 0
    assert f"usage: kvllm eval {name}" in result.output


def test_the_measurements_are_listed():
    output = CliRunner().invoke(app, ["eval"]).output
    assert all(name in output for name in COMMANDS)
