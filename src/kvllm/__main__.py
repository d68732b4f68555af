"""The `kvllm` command, also as `python -m kvllm`: the commands that serve, and those that measure."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from kvllm.cli.app import app as app
from kvllm.errors import UsageError
from kvllm.measure.bench.cli import app as bench_app
from kvllm.measure.demo.cli import demo
from kvllm.measure.eval.cli import app as eval_app
from kvllm.measure.inspect.cli import inspect

app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")
app.command()(demo)
app.command()(inspect)


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
