"""The commands that serve. Each imports what is slow to import when it runs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import kvllm
from kvllm.cli.options import PASS_THROUGH, JsonFile, flag, shown, with_config
from kvllm.errors import UsageError
from kvllm.options import options_of

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=kvllm.__doc__)
console = Console()
progress_console = Console(stderr=True)  # stdout holds the answer


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show:
        console.print(f"kvllm {kvllm.__version__}", highlight=False)
        raise typer.Exit


@app.command(context_settings=PASS_THROUGH, options_metavar="MODEL --prompt TEXT [OPTIONS] [vLLM'S ENGINE FLAGS]")
@with_config
def generate(
    context: typer.Context,
    options: dict,  # type: ignore[type-arg]
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 = all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid tokens that were there.")] = 1.0,
    sampling_seed: Annotated[int | None, typer.Option(help="Draw the same tokens each time.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the model's chat template.", show_default="if it has one"),
    ] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Leave KvLLM out, to compare.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Answer one prompt, and show what the KV cache took.

    vLLM's engine flags pass through: --dtype, --max-model-len, --block-size, --enforce-eager and all others.
    """
    from kvllm.cli.generate import Sampling
    from kvllm.cli.generate import generate as run

    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the prompt with either --prompt or --prompt-file.")
    if prompt_file and not prompt_file.is_file():
        raise UsageError(f"--prompt-file {prompt_file}: no such file.")
    if stock and options:
        raise UsageError(f"--stock leaves KvLLM out, so {', '.join(map(flag, options))} would have no effect.")
    text = prompt_file.read_text() if prompt_file else prompt or ""
    sampling = Sampling(max_tokens, temperature, top_p, top_k, repetition_penalty, sampling_seed, ignore_eos)
    generation = run(context.args, None if stock else options, text, sampling, chat, progress_console)
    console.print(generation.text, markup=False, highlight=False)
    console.print(generation.table())
    if json_file:
        json_file.write_text(generation.to_json())


@app.command(context_settings=PASS_THROUGH, options_metavar="MODEL [OPTIONS] [vLLM'S SERVE FLAGS]")
@with_config
def serve(
    context: typer.Context,
    options: dict,  # type: ignore[type-arg]
) -> None:
    """Start vLLM's OpenAI-compatible server with compression on.

    All flags of `vllm serve` pass through (`vllm serve --help=all` lists them); what --additional-config holds
    for other plugins is kept.
    """
    from kvllm.engine import arguments

    arguments.run_server(arguments.serve_arguments(context.args, options))


@app.command()
@with_config
def plan(
    options: dict,  # type: ignore[type-arg]
    model: Annotated[str, typer.Argument(help="A folder with config.json, or a name on the model hub.")],
    memory: Annotated[str, typer.Option(help="The device's memory, such as 80GiB.")],
    length: Annotated[str, typer.Option(help="Total lengths, prompt included.")] = "2048,8192,32768",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, never compressed.", min=1)] = 256,
    block_size: Annotated[int, typer.Option(help="Tokens in one KV block.", min=1)] = 16,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, or fp8 for one byte a number.")] = "auto",
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share that vLLM may use, as in vLLM.")] = 0.92,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            help="As in vLLM: the query bank's rows.",
            min=1,
            show_default="1024 from 70GiB on, else 256, or fewer that fit",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="As in vLLM: the longest text, prompt included.", min=1, show_default="the model's"),
    ] = None,
    reserve: Annotated[str, typer.Option(help="For activations and CUDA graphs.")] = "3GiB",
    weights: Annotated[str | None, typer.Option(help="Size of the weights.", show_default="from the config")] = None,
    json_file: JsonFile = None,
) -> None:
    """How many requests of which length fit a GPU, stock against compressed, from the model's config alone."""
    from transformers import AutoConfig

    from kvllm.cli import plan as planning
    from kvllm.compression.footprint import default_max_num_seqs, dtype_of, footprint, head_dim_of
    from kvllm.compression.rounding import Rounding
    from kvllm.layout import Geometry
    from kvllm.methods import checked_config
    from kvllm.support import packed_problem

    config = checked_config(options)
    device_bytes = planning.parse_bytes(memory)
    size = planning.parse_bytes(weights, "--weights") if weights else None
    model_config = AutoConfig.from_pretrained(model)
    text = model_config.get_text_config()
    one = footprint(model_config, config, 1, kv_cache_dtype, size, max_model_len)
    if problem := packed_problem(config.survivor_bits, dtype_of(model_config), kv_cache_dtype, text):
        raise UsageError(problem)
    rounding = Rounding.from_config(config, block_size, head_dim_of(text))
    geometry = Geometry.from_config(config, block_size, packed_tokens=rounding.block_tokens if rounding else None)
    num_seqs = max_num_seqs or default_max_num_seqs(device_bytes, gpu_memory_utilization, one)
    taken = replace(one, query_bank=num_seqs * one.query_bank)
    pool = planning.pool_bytes(device_bytes, gpu_memory_utilization, planning.parse_bytes(reserve, "--reserve"), taken)
    made = planning.plan(taken, pool, geometry, block_size, prompt_tokens, planning.parse_lengths(length))
    console.print(planning.summary(made), highlight=False)
    console.print(planning.table(made))
    if json_file:
        json_file.write_text(json.dumps(made.to_dict(), indent=2) + "\n")


@app.command(context_settings=PASS_THROUGH, options_metavar="[MODEL] [OPTIONS] [vLLM'S SERVE FLAGS]")
@with_config
def doctor(
    context: typer.Context,
    options: dict,  # type: ignore[type-arg]
    json_file: JsonFile = None,
) -> None:
    """Find what is wrong before an engine starts: versions, plugin, GPU, options and, if one is named, the model.

    Takes the arguments of `serve`. Exit status 1 if anything would keep it from starting.
    """
    from kvllm.cli.doctor import examine, model_and_rest, table

    findings = examine(*model_and_rest(context.args), options)
    console.print(table(findings))
    if json_file:
        json_file.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def methods() -> None:
    """List the compression methods and the options of each (--method-options)."""
    from rich.text import Text

    from kvllm.methods import SHARED_OPTIONS
    from kvllm.methods import methods as registry

    table = Table("method, its options", "default", "accepts", "what it keeps, what the option does")
    for name, cls in registry().items():
        table.add_section()
        table.add_row(Text(name, "bold"), "", "", Text((cls.__doc__ or "").strip().splitlines()[0], "bold"))
        for option in options_of(cls).values():
            if option.name not in SHARED_OPTIONS:
                # Text: brackets, as in [0, 1], are no markup.
                cells = (f"  {option.name}", shown(option.default), option.accepts, option.help)
                table.add_row(*map(Text, cells))
    console.print(table)
