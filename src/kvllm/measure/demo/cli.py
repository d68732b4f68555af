"""`kvllm demo`: the command and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvllm.cli.options import with_config


@with_config
def demo(
    options: dict,  # type: ignore[type-arg]
    model: Annotated[Path, typer.Option(help="A model's folder.")],
    num_requests: Annotated[int, typer.Option(help="Number of requests, all sent at once.", min=1)] = 12,
    max_tokens: Annotated[int, typer.Option(help="Length of each answer, in tokens.", min=1)] = 512,
    num_fitting: Annotated[
        int, typer.Option(help="Size of the KV pool: how many uncompressed requests fit.", min=1)
    ] = 4,
    out: Annotated[Path, typer.Option(help="Output folder for the picture, figures and logs.")] = Path("kvllm-demo"),
) -> None:
    """Compare stock vLLM with KvLLM, live, on a dozen requests that exceed the KV pool.

    Uses windows of 128 tokens and a buffer of 64, since the answers are short; all other options can be set.
    """
    from kvllm.cli.app import console
    from kvllm.measure.demo.run import run

    run(model, num_requests, max_tokens, num_fitting, options, out, console)
