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
            help="JSONL of conversations, of prompts with or without answers, or of traces.",
            exists=True,
            dir_okay=False,
        ),
    ],
    saving: Annotated[
        float | None, typer.Option(help="How many times less KV cache, over the life of these texts.", min=1)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Highest KL from the full cache, in nats a token, on these texts.", min=0)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of answers that the model writes here.", min=1)] = 1024,
    temperature: Annotated[float, typer.Option(help="Of answers that the model writes here; 0 = greedy.", min=0)] = 0.7,
    limit: Annotated[int | None, typer.Option(help="Use only the first texts.", min=1)] = None,
    save_traces: Annotated[
        Path | None,
        typer.Option(
            help="Write the texts here, as traces, so that answers need not be written again.", callback=in_a_folder
        ),
    ] = None,
    block_size: BlockSize = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
) -> None:
    """Find settings for your model and texts: the saving that you want, or the loss that you accept.

    Replays each text with about twenty settings, with transformers alone, and prints the command that serves the best.
    """
    require("matplotlib", "scipy")
    from kvllm.measure.tune.run import run

    where = placement(device, dtype)
    text, report = run(texts, model, saving, max_kl, max_tokens, temperature, limit, block_size, *where, save_traces)
    print(text)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
