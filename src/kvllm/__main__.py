"""The `kvllm` command, also as `python -m kvllm`: the commands that serve, and those that measure."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from kvllm.cli.app import MEASURE, SERVE
from kvllm.cli.app import app as app
from kvllm.cli.options import examples
from kvllm.errors import UsageError
from kvllm.measure.bench.cli import app as bench_app
from kvllm.measure.demo.cli import demo
from kvllm.measure.eval.cli import app as eval_app
from kvllm.measure.inspect.cli import inspect
from kvllm.measure.tune.cli import tune

app.add_typer(bench_app, name="bench", rich_help_panel=MEASURE)
app.add_typer(eval_app, name="eval", rich_help_panel=MEASURE)
app.command(
    rich_help_panel=MEASURE,
    epilog=examples(
        "kvllm inspect MODEL --prompt 'Prove that 17 is prime.' --max-tokens 2048 -o page.html",
        "kvllm inspect MODEL --trace traces.jsonl --trace-id 17 --retention-ratio 0.25",
    ),
)(inspect)
app.command(
    rich_help_panel=MEASURE,
    epilog=examples("kvllm tune MODEL texts.jsonl --saving 2.5"),
)(tune)
app.command(rich_help_panel=SERVE, epilog=examples("kvllm demo --model MODEL"))(demo)


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
