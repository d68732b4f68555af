"""The `kvllm` command, also `python -m kvllm`: serving commands and, if kvllm-measure is installed, measurements."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from kvllm.cli.app import app as app
from kvllm.cli.measuring import add_stand_ins, why_missing
from kvllm.cli.quiet import configure_early
from kvllm.errors import UsageError


def add_measuring() -> None:
    """The only import of `kvllm.measure` from outside it, since it is a separate package, kvllm-measure."""
    if why := why_missing():
        add_stand_ins(app, why)
    else:
        from kvllm.measure.commands import add_commands

        add_commands(app)


add_measuring()
configure_early()  # a process that vLLM spawns imports this module as well


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a UsageError is one line on stderr and exit code 2, not a traceback.

    KVLLM_TRACEBACK=1 in the environment shows the traceback all the same.
    """
    try:
        app(arguments)
    except UsageError as e:
        if os.environ.get("KVLLM_TRACEBACK"):
            raise
        typer.echo(f"Error: {e}", err=True)
        raise SystemExit(2) from e


if __name__ == "__main__":
    main()
