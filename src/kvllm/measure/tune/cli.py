"""`kvllm tune`: the command and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvllm.cli.options import JsonFile, in_a_folder
from kvllm.measure.eval.cli import BlockSize, Device, Dtype, placement
from kvllm.measure.extras import require


def tune(
    model: Annotated[str, typer.Argument(help="The model's folder.")],
    texts: Annotated[
        Path,
        typer.Argument(
            help="JSONL file of conversations, prompts (with or without answers) or traces.",
            exists=True,
            dir_okay=False,
        ),
    ],
    saving: Annotated[
        float | None, typer.Option(help="Wanted saving: KV cache of these texts divided by this, on average.", min=1)
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Accepted loss: maximum KL from the full cache on these texts, in nats per token.", min=0),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum length of generated answers in tokens.", min=1)] = 1024,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature of generated answers; 0 = greedy.", min=0)
    ] = 0.7,
    limit: Annotated[int | None, typer.Option(help="Use only the first N texts.", min=1)] = None,
    save_traces: Annotated[
        Path | None,
        typer.Option(help="Save the texts as traces to this file, to reuse generated answers.", callback=in_a_folder),
    ] = None,
    block_size: BlockSize = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
) -> None:
    """Find the best settings for your model and texts, given a wanted saving or an accepted loss.

    Replays each text with about twenty settings (with transformers, without vLLM), and prints the command that serves
    the model with the best.
    """
    require("matplotlib", "scipy")
    from kvllm.measure.tune.run import run

    where = placement(device, dtype)
    text, report = run(texts, model, saving, max_kl, max_tokens, temperature, limit, block_size, *where, save_traces)
    print(text)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
