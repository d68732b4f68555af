"""`kvllm demo`: one long answer from stock vLLM and from KvLLM, side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvllm.cli.generate import Generation
from kvllm.cli.options import flag
from kvllm.config import KvConfig
from kvllm.engine.arguments import check_plugin_is_loaded
from kvllm.errors import UsageError
from kvllm.layout import request_geometry
from kvllm.methods import checked_config

PROMPT = (
    "Explain, step by step and in great detail, how a computer adds, multiplies and sorts numbers. "
    "Give many worked examples with numbers."
)
BLOCK_SIZE = 32  # what vLLM's CPU attention is made for
MAX_PROMPT = 512
# Not greedy: the greedy answers of so small a model end in a loop. The seed makes both engines draw the same numbers.
SAMPLING = ("--temperature", "0.7", "--sampling-seed", "0", "--ignore-eos")
RUN = 8
FEWEST_DISTINCT = 0.5


@dataclass(frozen=True)
class Comparison:
    """How the compressed answer relates to the stock one.

    num_same:         leading tokens that are the same
    share_identical:  share of positions with the same token; after the first difference the texts go apart
    share_distinct:   share of distinct runs of 8 tokens in the stock answer; on a text that repeats itself every
                      method agrees with the full cache, and the figures above and below say nothing
    replay_agreement: by method, share of rows where it chooses the next token that the full cache chooses when fed
                      the stock answer, counted from the first compression; empty if nothing was compressed
    """

    num_same: int
    share_identical: float
    share_distinct: float
    replay_agreement: dict[str, float]


def demo(model: Path, max_tokens: int, dtype: str, options: Mapping[str, Any], console: Console) -> None:
    """Run both engines, each in a process of its own, and print what came out."""
    check_plugin_is_loaded()
    config = checked_config(options)
    vllm_flags = ["--dtype", dtype, "--block-size", str(BLOCK_SIZE), "--max-model-len", str(max_tokens + MAX_PROMPT)]
    # Eager, since compiling needs a C++ compiler; a small pool, since one request is all there is.
    vllm_flags += ["--enforce-eager", "--kv-cache-memory-bytes", "1G"]
    arguments = ["generate", str(model), "--max-tokens", str(max_tokens), *SAMPLING, *vllm_flags]
    console.print(f"Prompt: {PROMPT}\n", highlight=False)
    console.print("Stock vLLM ...")
    stock = run_generate([*arguments, "--prompt", PROMPT, "--stock"])
    geometry = request_geometry(config, BLOCK_SIZE)
    kept = f"keeping {config.mean_ratio:.0%} of each window" if geometry else "compressing nothing"
    console.print(f"KvLLM, {config.method}, {kept} at each compression ...", highlight=False)
    ours = run_generate([*arguments, "--prompt", PROMPT, *as_flags(options)])
    console.print("Replaying the stock answer under compression ...")
    # Random eviction is the line that every claim must beat.
    replayed = [config] if config.method == "random" else [config, replace(config, method="random", method_options={})]
    comparison = compare(stock, ours, replay_agreement(model, stock, replayed))
    console.print(table(stock, ours, comparison))
    if comparison.share_distinct < FEWEST_DISTINCT:
        console.print("The stock answer repeats itself: these shares say little. Try another --max-tokens or --model.")
    console.print(
        "\nNext:\n"
        f"  kvllm generate {model} --prompt 'Why is the sky blue?' --retention-ratio 0.5 --block-size {BLOCK_SIZE}\n"
        f"  kvllm plan {model} --memory 8GiB\n"
        f"  kvllm serve {model} --retention-ratio 0.3",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def run_generate(arguments: Sequence[str]) -> Generation:
    """`kvllm generate` in a process of its own: two engines in one would share what vLLM keeps globally."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "kvllm", *arguments, "--json", str(result)]
        with log.open("w") as out:
            process = subprocess.run(command, stdout=out)
        if process.returncode:
            tail = "\n".join(log.read_text().splitlines()[-20:])
            raise UsageError(f"`{' '.join(command)}` failed with exit code {process.returncode}.\n{tail}")
        return Generation(**json.loads(result.read_text()))


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """The command line that gives these KvConfig fields."""
    parts = ((flag(name), json.dumps(v) if isinstance(v, Mapping) else str(v)) for name, v in options.items())
    return [word for pair in parts for word in pair]


def replay_agreement(model: Path, stock: Generation, configs: Sequence[KvConfig]) -> dict[str, float]:
    """By method, how often the compressed cache chooses the next token that the full cache chooses."""
    from kvllm import reference

    geometry = request_geometry(configs[0], BLOCK_SIZE)
    text, num_prompt = [*stock.prompt_token_ids, *stock.token_ids], len(stock.prompt_token_ids)
    first = geometry.event_at(num_prompt, 0) if geometry else len(text)
    if first >= len(text) - 1:
        return {}
    loaded = reference.load_model(model)
    full = reference.replay(loaded, text, num_prompt, None, BLOCK_SIZE)
    agreement = {}
    for config in configs:
        compressed = reference.replay(loaded, text, num_prompt, config, BLOCK_SIZE)
        agreement[config.method] = float((full.argmax == compressed.argmax)[first:].float().mean())
    return agreement


def compare(stock: Generation, ours: Generation, agreement: dict[str, float]) -> Comparison:
    """Token by token, over the shorter of the two."""
    same = [a == b for a, b in zip(stock.token_ids, ours.token_ids, strict=False)]
    runs = [tuple(stock.token_ids[i : i + RUN]) for i in range(max(1, len(stock.token_ids) - RUN + 1))]
    return Comparison(
        num_same=same.index(False) if False in same else len(same),
        share_identical=sum(same) / len(same),
        share_distinct=len(set(runs)) / len(runs),
        replay_agreement=agreement,
    )


def table(stock: Generation, ours: Generation, comparison: Comparison) -> Table:
    made = Table("", "stock vLLM", "KvLLM")
    rows = (
        ("tokens generated", len(stock.token_ids), len(ours.token_ids)),
        (f"KV blocks at the peak, {ours.block_size} tokens each", stock.peak_kv_blocks, ours.peak_kv_blocks),
        ("windows compressed", stock.num_windows_compressed, ours.num_windows_compressed),
        ("tokens per second, one request", f"{stock.tokens_per_second:.1f}", f"{ours.tokens_per_second:.1f}"),
        ("tokens before the first difference", "", comparison.num_same),
        ("share of identical tokens", "", f"{comparison.share_identical:.1%}"),
        (f"share of distinct runs of {RUN} tokens", f"{comparison.share_distinct:.1%}", ""),
    )
    for name, *cells in rows:
        made.add_row(name, *map(str, cells))
    for method, share in comparison.replay_agreement.items():
        made.add_row(f"same next token in teacher-forced replay, {method}", "", f"{share:.1%}")
    return made
