"""`kvllm eval`: each measurement has a parser of its own and runs as `python -m kvllm.measure.eval.NAME` as well."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Measure what compression changes.")

COMMANDS = {
    "traces": "Let a model answer problems, and keep the token ids for `fidelity`.",
    "fidelity": "Replay traces: KL, agreement and likelihood against the full cache.",
    "recall": "State a fact in the reasoning and ask for it later.",
    "accuracy": "Answer problems in the engine or at an endpoint, and grade the answers.",
    "grade": "Grade the log of `accuracy` again.",
    "calibrate": "Take the query statistics that the method triattention needs.",
}
# The parsers know the options, --help included.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _command(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        module = "kvllm.measure.eval.regrade" if name == "grade" else f"kvllm.measure.eval.{name}"
        importlib.import_module(module).main(context.args)

    return command


for _name, _help in COMMANDS.items():
    app.command(_name, help=_help, context_settings=PASS_THROUGH, add_help_option=False)(_command(_name))
