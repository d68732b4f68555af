from __future__ import annotations

import importlib.util

import pytest
from typer.testing import CliRunner

from kvllm.__main__ import app
from kvllm.errors import UsageError
from kvllm.measure.eval import cli
from kvllm.measure.extras import require
from tests.measure.commands import kvllm

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]


def test_the_measurements_are_listed():
    assert COMMANDS == [
        "traces", "fidelity", "attention", "recall", "frontier", "accuracy", "tracking", "chain", "grade", "calibrate",
        "calibrate-layers",
    ]  # fmt: skip
    output = CliRunner().invoke(app, ["eval"]).output
    assert all(name in output for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_measurement_shows_its_own_options(name):
    result = CliRunner().invoke(app, ["eval", name, "--help"])
    assert result.exit_code == 0
    assert f"eval {name}" in result.output and "--" in result.output


@pytest.mark.parametrize("command", [
    ["fidelity", "--traces", __file__, "--model", "m"],
    ["attention", "--traces", __file__, "--model", "m"],
    ["recall", "--model", "m"],
    ["frontier", "--traces", __file__, "--model", "m"],
    ["accuracy", "m", "--out", "o"],
    ["tracking", "m", "--out", "o"],
    ["chain", "m", "--out", "o"],
    ["grade", __file__],
    ["calibrate", "--traces", __file__, "--model", "m", "--out", "o"],
    ["calibrate-layers", "--traces", __file__, "--model", "m", "--out", "o"],
])  # fmt: skip
def test_without_the_extra_a_measurement_says_what_to_install(monkeypatch, command):
    """Before it reads or measures anything."""
    monkeypatch.setattr("kvllm.measure.extras.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"this needs .*scipy.*in a checkout: uv pip install '\.\[measure\]'"):
        kvllm("eval", *command)


def test_only_what_is_missing_is_named():
    assert importlib.util.find_spec("numpy")
    require("numpy")
    with pytest.raises(UsageError, match="this needs no_such_module, which is not installed"):
        require("numpy", "no_such_module")


@pytest.mark.parametrize("dtype", ["float", "floaty", "nn"])
def test_a_dtype_that_torch_lacks_is_refused(dtype):
    if dtype == "float":  # torch's own name of float32
        assert cli.placement("cpu", dtype) == ("cpu", "float")
        return
    with pytest.raises(UsageError, match=f"--dtype {dtype}: not a torch dtype"):
        cli.placement("cpu", dtype)


@pytest.mark.parametrize(
    "name, option",
    [
        *(("calibrate-layers", "--out"), ("calibrate", "--out"), ("frontier", "--log"), ("frontier", "--json")),
        *(("frontier", "--markdown"), ("frontier", "--plot"), ("fidelity", "--plot"), ("attention", "--plot")),
    ],
)
def test_a_file_in_no_folder_is_refused_before_work_starts(tmp_path, name, option):
    with pytest.raises(UsageError, match=f"{option} .*/no/file: the folder .*/no does not exist; create it first"):
        kvllm("eval", name, "--traces", __file__, "--model", "m", option, str(tmp_path / "no" / "file"))
