"""The serving commands. Slow imports happen inside each command."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from errno import EADDRINUSE
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import kvllm
from kvllm.cli.options import PASS_THROUGH, JsonFile, examples, flag, suggesting_flags, with_config
from kvllm.errors import UsageError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=kvllm.__doc__)
console = Console()
progress_console = Console(stderr=True)  # stdout holds the answer
SAMPLING, DEVICE = "Sampling", "The device, for experts"  # panels of options in help
SERVE, MEASURE = "Serve", "Understand and measure"  # panels of commands


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show:
        console.print(f"kvllm {kvllm.__version__}", highlight=False)
        raise typer.Exit


@app.command(
    rich_help_panel=SERVE,
    context_settings=PASS_THROUGH,
    options_metavar="MODEL --prompt TEXT [OPTIONS] [vLLM'S ENGINE FLAGS]",
    epilog=examples(
        "kvllm generate Qwen/Qwen3-8B --prompt 'Prove that 17 is prime.' --max-tokens 4096 --compression 8x",
        "kvllm generate MODEL --prompt-file question.txt --retention-ratio 0.5 --json figures.json",
        "kvllm generate MODEL --prompt-file question.txt --stock",
    ),
)
@with_config
def generate(
    context: typer.Context,
    options: dict,  # type: ignore[type-arg]
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 = greedy.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the smallest set of tokens with at least this total probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from the k most likely tokens; 0 = all.", rich_help_panel=SAMPLING)
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: make tokens that already occurred less likely.", rich_help_panel=SAMPLING)
    ] = 1.0,
    sampling_seed: Annotated[
        int | None, typer.Option(help="Random seed, for reproducible sampling.", rich_help_panel=SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos",
            help="Do not stop at the end-of-text token; generate --max-tokens.",
            rich_help_panel=SAMPLING,
        ),
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Wrap the prompt in the model's chat template.", show_default="if it has one"
        ),
    ] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Run stock vLLM without KvLLM, for comparison.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Answer one prompt and show how much KV cache it used.

    All of vLLM's engine flags are accepted too, such as --dtype, --max-model-len or --enforce-eager.
    """
    from kvllm.cli.generate import Sampling
    from kvllm.cli.generate import generate as run

    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the prompt with either --prompt or --prompt-file.")
    if prompt_file and not prompt_file.is_file():
        raise UsageError(f"--prompt-file {prompt_file}: no such file; give the path of a text file.")
    if stock and options:
        raise UsageError(
            f"--stock runs without KvLLM, so {', '.join(map(flag, options))} would have no effect; leave out either."
        )
    text = prompt_file.read_text() if prompt_file else prompt or ""
    sampling = Sampling(max_tokens, temperature, top_p, top_k, repetition_penalty, sampling_seed, ignore_eos)
    generation = run(context.args, None if stock else options, text, sampling, chat, progress_console)
    console.print(generation.text, markup=False, highlight=False)
    console.print(generation.table())
    if json_file:
        json_file.write_text(generation.to_json())


@app.command(
    rich_help_panel=SERVE,
    context_settings=PASS_THROUGH,
    options_metavar="MODEL [OPTIONS] [vLLM'S SERVE FLAGS]",
    epilog=examples(
        "kvllm serve Qwen/Qwen3-8B --compression 8x",
        "kvllm serve Qwen/Qwen3-32B --retention-ratio 0.3 --tensor-parallel-size 2 --port 8000",
        "kvllm serve MODEL --request-ratios 0.2-0.5,1.0",
    ),
)
@with_config
def serve(
    context: typer.Context,
    options: dict,  # type: ignore[type-arg]
) -> None:
    """Start vLLM's OpenAI-compatible server with compression enabled.

    All flags of `vllm serve` are accepted too (`vllm serve --help=all` lists them). Entries of --additional-config for
    other plugins are preserved.
    """
    from kvllm.engine import arguments
    from kvllm.support import finding_model

    with suggesting_flags(context.args):
        model, command = arguments.serve_arguments(context.args, options)
    with finding_model(model):
        try:
            arguments.run_server(command)
        except OSError as e:
            if e.errno != EADDRINUSE:
                raise
            raise UsageError("the server's port is in use; stop the other server, or use another --port.") from e


@app.command(
    rich_help_panel=SERVE,
    epilog=examples(
        "kvllm plan Qwen/Qwen3-8B --memory 80GiB --compression 8x",
        "kvllm plan Qwen/Qwen3-8B --memory 24GiB --length 4096,16384 --prompt-tokens 512 --retention-ratio 0.3",
    ),
)
@with_config
def plan(
    options: dict,  # type: ignore[type-arg]
    model: Annotated[
        str, typer.Argument(help="A folder with config.json, or a name on the model hub.", metavar="MODEL")
    ],
    memory: Annotated[str, typer.Option(help="Device memory, such as 80GiB.", metavar="SIZE")],
    length: Annotated[
        str, typer.Option(help="Comma-separated request lengths in tokens, prompt included.")
    ] = "2048,8192,32768",
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length in tokens; prompts stay whole.", min=1)] = 256,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens per KV block, as vLLM's --block-size.",
            min=1,
            show_default="the engine's default",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="As in vLLM: auto = the model's dtype, fp8 = one byte.", rich_help_panel=DEVICE)
    ] = "auto",
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="As in vLLM: share of device memory that vLLM may use.", rich_help_panel=DEVICE)
    ] = 0.92,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            help="As in vLLM: maximum number of concurrent requests; each takes one row of the query bank.",
            min=1,
            show_default="1024 from 70GiB on, else 256; fewer if they do not fit",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="As in vLLM: maximum request length in tokens, prompt included.",
            min=1,
            show_default="the model's",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    language_model_only: Annotated[
        bool,
        typer.Option(
            "--language-model-only",
            help="As in vLLM: serve text alone with a model that also takes images.",
            rich_help_panel=DEVICE,
        ),
    ] = False,
    reserve: Annotated[
        str,
        typer.Option(help="Memory reserved for activations and CUDA graphs.", metavar="SIZE", rich_help_panel=DEVICE),
    ] = "3GiB",
    weights: Annotated[
        str | None,
        typer.Option(
            help="Memory for the weights.", metavar="SIZE", show_default="from the config", rich_help_panel=DEVICE
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show how many requests fit on a device, with and without compression.

    Reads only the model's config and needs no GPU. Refuses what `kvllm serve` would refuse.
    """
    from transformers import AutoConfig

    from kvllm.checks import check_geometry
    from kvllm.cli import plan as planning
    from kvllm.compression.footprint import default_max_num_seqs, footprint, head_dim_of
    from kvllm.compression.rounding import Rounding
    from kvllm.groups import full_layers
    from kvllm.layers import local_layers
    from kvllm.layout import request_geometry
    from kvllm.methods import checked_config, with_budgets
    from kvllm.support import default_block_size, finding_model

    device_bytes = planning.parse_bytes(memory)
    size = planning.parse_bytes(weights, "--weights") if weights else None
    with finding_model(model):
        model_config = AutoConfig.from_pretrained(model)
    text = model_config.get_text_config()
    longest = max_model_len or getattr(text, "max_position_embeddings", None)
    config = with_budgets(checked_config(options), full_layers(local_layers(text, longest)))
    one = footprint(model_config, config, 1, kv_cache_dtype, size, max_model_len, language_model_only)
    planning.check(config, model_config, kv_cache_dtype, longest, language_model_only)
    if block_size is None:
        block_size = default_block_size("cuda", config.survivor_bits, kv_cache_dtype)
    block_size *= one.groups.scale
    rounding = Rounding.from_config(config, block_size, head_dim_of(text), kv_cache_dtype)
    packed = rounding.block_tokens if rounding else None
    check_geometry(config, block_size, longest, packed)
    geometry = request_geometry(config, block_size, packed_tokens=packed)
    num_seqs = max_num_seqs or default_max_num_seqs(device_bytes, gpu_memory_utilization, one)
    taken = replace(one, query_bank=num_seqs * one.query_bank)
    pool = planning.pool_bytes(device_bytes, gpu_memory_utilization, planning.parse_bytes(reserve, "--reserve"), taken)
    made = planning.plan(taken, pool, geometry, block_size, prompt_tokens, planning.parse_lengths(length))
    console.print(planning.summary(made), highlight=False)
    console.print(planning.table(made))
    if json_file:
        json_file.write_text(json.dumps(made.to_dict(), indent=2) + "\n")


@app.command(
    rich_help_panel=SERVE,
    context_settings=PASS_THROUGH,
    options_metavar="[MODEL] [OPTIONS] [vLLM'S SERVE FLAGS]",
    epilog=examples("kvllm doctor", "kvllm doctor Qwen/Qwen3-8B --compression 8x --tensor-parallel-size 2"),
)
@with_config
def doctor(
    context: typer.Context,
    options: dict,  # type: ignore[type-arg]
    json_file: JsonFile = None,
) -> None:
    """Check versions, plugin, GPU, options and, if given, the model, without starting an engine.

    Takes the same arguments as `serve`. Exits with status 1 if anything would prevent the server from starting.
    """
    from kvllm.cli.doctor import examine, model_and_rest, table
    from kvllm.cli.quiet import silence_vllm

    silence_vllm(context.args)
    findings = examine(*model_and_rest(context.args), options)
    console.print(table(findings))
    if json_file:
        json_file.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(1)


@app.command(
    rich_help_panel=MEASURE,
    epilog=examples(
        "kvllm methods",
        "kvllm methods snapkv",
        "kvllm methods --json methods.json",
        """kvllm serve MODEL --method snapkv --method-options '{"num_observed": 16}'""",
    ),
)
def methods(
    method: Annotated[
        str | None, typer.Argument(help="Show this one in full.", show_default="all", metavar="METHOD")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List the compression methods and their options, or show one in full.

    Of one method, shows what it does and how it differs from its paper, the paper, its options and a command to try it.
    """
    from kvllm.cli.methods import describe, describe_all, page, table, to_json

    described = describe_all() if method is None else [describe(method)]
    if json_file:
        json_file.write_text(to_json(described))
    if method is not None:
        console.print(page(described[0]))
        console.print(f"\nTry it:\n    {described[0].command}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(table(described))
        console.print("`kvllm methods METHOD` shows one in full.", highlight=False)
