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
    num_requests: Annotated[int, typer.Option(help="Requests, all sent at once.", min=1)] = 12,
    max_tokens: Annotated[int, typer.Option(help="Length of each answer, in tokens.", min=1)] = 512,
    num_fitting: Annotated[int, typer.Option(help="How many of them the KV pool holds uncompressed.", min=1)] = 4,
    out: Annotated[Path, typer.Option(help="Folder for the picture, the figures and the logs.")] = Path("kvllm-demo"),
) -> None:
    """A dozen requests in a KV pool that is too small for them: stock vLLM against KvLLM, live.

    Windows of 128 tokens and a buffer of 64, since the answers are short; other options as given.
    """
    from kvllm.cli.app import console
    from kvllm.measure.demo.run import run

    run(model, num_requests, max_tokens, num_fitting, options, out, console)
