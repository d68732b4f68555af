"""All commands that measure, in the order of `kvllm --help`."""

from __future__ import annotations

import typer

from kvllm.cli.app import MEASURE, SERVE
from kvllm.cli.options import examples
from kvllm.measure.bench.cli import app as bench_app
from kvllm.measure.demo.cli import demo
from kvllm.measure.eval.cli import app as eval_app
from kvllm.measure.inspect.cli import inspect
from kvllm.measure.tune.cli import tune


def add_commands(app: typer.Typer) -> None:
    app.add_typer(bench_app, name="bench", rich_help_panel=MEASURE)
    app.add_typer(eval_app, name="eval", rich_help_panel=MEASURE)
    app.command(
        rich_help_panel=MEASURE,
        epilog=examples(
            "kvllm inspect MODEL --prompt 'Prove that 17 is prime.' --max-tokens 2048 -o page.html",
            "kvllm inspect MODEL --trace traces.jsonl --trace-id 17 --retention-ratio 0.25",
        ),
    )(inspect)
    app.command(rich_help_panel=MEASURE, epilog=examples("kvllm tune MODEL texts.jsonl --saving 2.5"))(tune)
    app.command(rich_help_panel=SERVE, epilog=examples("kvllm demo --model MODEL"))(demo)
