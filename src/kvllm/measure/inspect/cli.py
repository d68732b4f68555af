"""`kvllm inspect`: the command and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvllm.cli.options import in_a_folder, with_config
from kvllm.errors import UsageError


@with_config
def inspect(
    options: dict,  # type: ignore[type-arg]
    model: Annotated[Path, typer.Argument(help="A model's folder.")],
    prompt: Annotated[str | None, typer.Option(help="A prompt, which the model answers greedily.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.", exists=True)] = None,
    trace: Annotated[
        Path | None, typer.Option(help="JSONL file of `kvllm eval traces`, instead of a prompt.", exists=True)
    ] = None,
    trace_id: Annotated[str | None, typer.Option(help="Id of the trace to show.", show_default="the first")] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Maximum answer length in tokens; longer traces are cut.", min=1)
    ] = 1024,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block, as vLLM's --block-size.", min=1)] = 16,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.", callback=in_a_folder)] = Path(
        "inspect.html"
    ),
) -> None:
    """Write an HTML page that shows which tokens of a text each compression kept. It works offline.

    Uses the reference implementation on the CPU, which is slow: meant for texts of up to a few thousand tokens.
    """
    from kvllm.measure.inspect.run import run

    if sum(given is not None for given in (prompt, prompt_file, trace)) != 1:
        raise UsageError("give exactly one of --prompt, --prompt-file and --trace.")
    text = prompt_file.read_text() if prompt_file else prompt
    made = run(model, text, trace, trace_id, max_tokens, options, block_size)
    output.write_text(made)
    typer.echo(f"{output}: {len(made) / 2**20:.1f} MiB")
