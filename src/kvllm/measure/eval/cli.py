"""`kvllm eval`: commands and options. The implementations are in this package's modules, imported on use."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvllm.cli.options import PASS_THROUGH, JsonFile, examples, in_a_folder, set_panels
from kvllm.errors import UsageError
from kvllm.measure.eval.sweep import BASELINES, Case, parse_cases
from kvllm.measure.extras import require
from kvllm.options import parse_json, parse_numbers

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Measure how compression changes a model's output."
)


class Half(StrEnum):
    """Every other trace, starting from the first (train) or the second (test)."""

    train = "train"
    test = "test"


class LayerRule(StrEnum):
    """How layer budgets are chosen."""

    kl = "kl"
    cake = "cake"
    pyramid = "pyramid"


TracesFile = Annotated[Path, typer.Option("--traces", help="JSONL file written by `kvllm eval traces`.", exists=True)]
TracedModel = Annotated[str, typer.Option("--model", help="Folder of the model that generated the traces.")]
HalfOfTraces = Annotated[
    Half | None,
    typer.Option(
        "--half", help="Use one half of the traces (alternating): tune on train, report on test.", show_default="all"
    ),
]
Methods = Annotated[
    str | None, typer.Option("--methods", help="Comma-separated methods; each is measured at every ratio.")
]
Ratios = Annotated[
    str | None, typer.Option("--ratios", help="Comma-separated retention ratios.", show_default="KvLLM's default")
]
Configs = Annotated[
    list[str] | None,
    typer.Option(
        "--configs",
        help="Configurations: a built-in sweep (methods, kara, chain), a JSON file, or JSON (repeatable).",
        show_default=False,
    ),
]
Common = Annotated[str, typer.Option("--common", help="Options that all configurations share, as JSON.")]
BlockSize = Annotated[int, typer.Option("--block-size", help="Tokens per KV block, as vLLM's --block-size.", min=1)]
Device = Annotated[str | None, typer.Option("--device", help="torch device.", show_default="cuda if available")]
Dtype = Annotated[str, typer.Option("--dtype", help="torch dtype; auto = float32 on the CPU, else bfloat16.")]
MarkdownFile = Annotated[
    Path | None,
    typer.Option("--markdown", help="Also write the table to this Markdown file.", callback=in_a_folder),
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Your own problems: JSONL with `problem` and `answer`.", exists=True)
]
NumProblems = Annotated[
    int | None,
    typer.Option("--problems", help="Number of problems, evenly spaced over the task.", show_default="all", min=1),
]
SamplingSeed = Annotated[
    int | None, typer.Option("--sampling-seed", help="Random seed; each request derives its own, in any batch.")
]


def _cases(
    configs: list[str] | None, methods: str | None, ratios: str | None, common: str, baselines: str | None = None
) -> list[Case]:
    names = BASELINES if baselines is None else [name for name in baselines.split(",") if name]
    return parse_cases(configs or [], methods, ratios, parse_json("--common", common), names)


def placement(device: str | None, dtype: str) -> tuple[str, str]:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UsageError(f"--dtype {dtype}: not a torch dtype; use auto, float32, bfloat16 or float16.")
    return device, dtype


@app.command(
    context_settings=PASS_THROUGH,
    options_metavar="[OPTIONS] [vLLM'S ENGINE FLAGS]",
    epilog=examples(
        "kvllm eval traces MODEL --out traces.jsonl --task math500 --problems 80 --min-tokens 450 --max-tokens 1024",
    ),
)
def traces(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's folder, or a name on the model hub.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.", callback=in_a_folder)],
    task: Annotated[str, typer.Option(help="math500 or gsm8k; with --data, any name.")] = "math500",
    data: Data = None,
    problems: NumProblems = None,
    chain: Annotated[
        int | None, typer.Option(help="Problems per prompt, as in `chain`, for long traces.", show_default="1", min=2)
    ] = None,
    keep: Annotated[
        int | None, typer.Option(help="Traces to keep, evenly spaced over those with --min-tokens.", show_default="all")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum answer length in tokens.", min=1)] = 1024,
    min_tokens: Annotated[int, typer.Option(help="Drop answers shorter than this.", min=0)] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 = greedy.", min=0)] = 0.7,
    sampling_seed: SamplingSeed = None,
) -> None:
    """Let a model answer problems with stock vLLM and save the token ids for `fidelity`.

    On CPUs, leave out --sampling-seed: vLLM's CPU sampler cannot seed requests whose prefill is chunked.
    """
    from kvllm.measure.eval.traces import run

    arguments = [model, *context.args]
    run(arguments, out, task, data, problems, chain, keep, max_tokens, min_tokens, temperature, sampling_seed)


@app.command(
    epilog=examples(
        "kvllm eval fidelity --traces traces.jsonl --model MODEL --methods kara,snapkv --ratios 0.3 --json out.json",
    ),
)
def fidelity(
    traces: TracesFile,
    model: TracedModel,
    methods: Methods = None,
    ratios: Ratios = None,
    configs: Configs = None,
    common: Common = "{}",
    half: HalfOfTraces = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N traces (of the half).", min=1)] = None,
    block_size: BlockSize = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Plot KL and agreement against the ratio to this file (.svg, .png).", callback=in_a_folder
        ),
    ] = None,
) -> None:
    """Replay traces under compression and compare KL, agreement and likelihood with the full cache.

    The methods random and recent are always included.
    """
    require("matplotlib", "scipy")
    from kvllm.measure.eval.fidelity import run
    from kvllm.measure.eval.report import Outputs

    cases, outputs = _cases(configs, methods, ratios, common), Outputs(json_file, markdown_file, plot_file)
    run(traces, model, cases, half, limit, block_size, *placement(device, dtype), outputs)


@app.command(
    epilog=examples("kvllm eval attention --traces traces.jsonl --model MODEL --plot attention.svg"),
)
def attention(
    traces: TracesFile,
    model: TracedModel,
    common: Annotated[str, typer.Option("--common", help="Window and buffer sizes, as JSON.")] = "{}",
    half: HalfOfTraces = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N traces (of the half).", min=1)] = None,
    later: Annotated[
        int, typer.Option(help="Use the queries of this many tokens after each compression.", min=1)
    ] = 256,
    block_size: BlockSize = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Plot weights by position, and their coverage, to this file (.svg, .png).",
            callback=in_a_folder,
        ),
    ] = None,
) -> None:
    """Compare how well bidirectional and causal attention weights predict the attention of later queries."""
    require("matplotlib", "scipy")
    from kvllm.measure.eval.attention import run
    from kvllm.measure.eval.report import Outputs
    from kvllm.methods import checked_config

    config, outputs = checked_config(parse_json("--common", common)), Outputs(json_file, markdown_file, plot_file)
    run(traces, model, config, half, limit, later, block_size, *placement(device, dtype), outputs)


@app.command(
    epilog=examples(
        "kvllm eval recall --model MODEL --methods kara --ratios 0.3 --distances 512,1024,2048 --plot recall.svg",
    ),
)
def recall(
    model: Annotated[str, typer.Option(help="A model's folder.")],
    methods: Methods = None,
    ratios: Ratios = None,
    configs: Configs = None,
    common: Common = "{}",
    distances: Annotated[
        str, typer.Option(help="Comma-separated numbers of tokens between the prompt and the question.")
    ] = "512,1024",
    depths: Annotated[
        str, typer.Option(help="Relative positions of the fact among these tokens, 0 to 1.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    samples: Annotated[int, typer.Option(help="Number of samples per distance and depth.", min=1)] = 8,
    data: Data = None,
    block_size: BlockSize = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw a heat map per method to this file (.svg, .png).", callback=in_a_folder),
    ] = None,
) -> None:
    """Insert a fact into the reasoning and ask for it later.

    The full cache and the methods random and recent are always included.
    """
    require("matplotlib", "scipy")
    from kvllm.measure.eval.recall import run
    from kvllm.measure.eval.report import Outputs

    cases, outputs = _cases(configs, methods, ratios, common), Outputs(json_file, markdown_file, plot_file)
    sizes = parse_numbers("--distances", distances, int, "512,1024")
    places = parse_numbers("--depths", depths, float, "0.1,0.5,0.9")
    run(model, cases, sizes, places, samples, block_size, *placement(device, dtype), outputs, data)


@app.command(epilog=examples("kvllm eval frontier --traces traces.jsonl --half test --model MODEL --recall-samples 4"))
def frontier(
    traces: TracesFile,
    model: TracedModel,
    methods: Annotated[
        str, typer.Option(help="Comma-separated methods, all with all --bits; only the first with all --caches.")
    ] = ("kara,random,keydiff,expected_attention"),
    caches: Annotated[str, typer.Option(help="Precisions of the whole cache, as in vLLM's --kv-cache-dtype.")] = (
        "auto,fp8,turboquant_k8v4,turboquant_4bit_nc,turboquant_k3v4_nc,turboquant_3bit_nc"
    ),
    bits: Annotated[
        str, typer.Option(help="Bits per number of the survivors; 16 = the cache's own precision.")
    ] = "16,8,4",
    sizes: Annotated[
        str, typer.Option(help="Sizes of a compressed window, relative to 16 bits uncompressed.")
    ] = "0.0625,0.125,0.25,0.5",
    common: Common = "{}",
    half: HalfOfTraces = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N traces (of the half).", min=1)] = None,
    recall_samples: Annotated[
        int, typer.Option(help="Samples per distance and depth of `recall`; 0 = no recall.", min=0)
    ] = 0,
    distances: Annotated[str, typer.Option(help="As in `recall`.")] = "512,1024",
    depths: Annotated[str, typer.Option(help="As in `recall`.")] = "0.1,0.3,0.5,0.7",
    data: Data = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Prompt length of the request whose cache size is reported.", min=1)
    ] = 256,
    answer_tokens: Annotated[
        int, typer.Option(help="Answer length of the request whose cache size is reported.", min=1)
    ] = 8192,
    block_size: BlockSize = 16,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this time; run again with the same --log to continue.", min=0)
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(help="Log file of single results; an existing one is continued.", callback=in_a_folder),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Plot KL against bytes (.svg, .png).", callback=in_a_folder)
    ] = None,
) -> None:
    """Compare settings by quality (KL, recall) against cache size, including vLLM's own cache precisions."""
    require("matplotlib", "scipy")
    from kvllm.measure.eval.frontier import Plan, run
    from kvllm.measure.eval.report import Outputs

    plan = Plan(
        methods=[name for name in methods.split(",") if name],
        caches=[name for name in caches.split(",") if name],
        bits=parse_numbers("--bits", bits, int, "16,4"),
        sizes=parse_numbers("--sizes", sizes, float, "0.125,0.25"),
        common=parse_json("--common", common),
        half=half,
        limit=limit,
        samples=recall_samples,
        distances=parse_numbers("--distances", distances, int, "512,1024"),
        depths=parse_numbers("--depths", depths, float, "0.1,0.5,0.9"),
        data=data,
        lengths=(prompt_tokens, answer_tokens),
        block_size=block_size,
        minutes=minutes,
    )
    run(traces, model, plan, log, *placement(device, dtype), Outputs(json_file, markdown_file, plot_file))


@app.command(
    context_settings=PASS_THROUGH,
    options_metavar="[OPTIONS] [vLLM'S ENGINE FLAGS]",
    epilog=examples(
        "kvllm eval accuracy MODEL --task math500 --methods kara --ratios 0.1,0.3,0.5 --samples 4 --out runs/math500",
        "kvllm eval accuracy NAME --endpoint http://localhost:8000/v1 --task gsm8k --ratios 0.3,1.0 --out runs/gsm8k",
    ),
)
def accuracy(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's folder or name; with --endpoint, its name on the server.")],
    out: Annotated[Path, typer.Option(help="Output folder for log and results; an unfinished run in it is continued.")],
    task: Annotated[str, typer.Option(help="math500 or gsm8k; with --data, any name (aime24).")] = "math500",
    data: Data = None,
    methods: Methods = None,
    ratios: Ratios = None,
    configs: Configs = None,
    common: Common = "{}",
    baselines: Annotated[str, typer.Option(help="Additional methods to measure; '' = none.")] = ",".join(BASELINES),
    problems: NumProblems = None,
    samples: Annotated[int, typer.Option(help="Answers per problem.", min=1)] = 1,
    max_tokens: Annotated[int, typer.Option(help="Maximum answer length in tokens.", min=1)] = 4096,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 = greedy.", min=0)] = 0.6,
    top_p: Annotated[float, typer.Option(help="As in vLLM: total probability of the tokens to sample from.")] = 0.95,
    sampling_seed: SamplingSeed = None,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server to use, such as http://localhost:8000/v1.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Maximum number of requests in flight to --endpoint.", min=1)] = 64,
) -> None:
    """Answer problems under compression and grade the answers.

    The full cache is always included.
    """
    require("math_verify", "matplotlib", "openai", "scipy")
    from kvllm.measure.eval import accuracy as task_accuracy
    from kvllm.measure.eval.engines import Sampling
    from kvllm.measure.eval.problems import load_problems, spread

    asked = spread(load_problems(task, data), problems)
    if endpoint:
        if context.args or methods or configs:
            raise UsageError("--endpoint: methods and flags are set on the server; only --ratios can be chosen here.")
        chosen = parse_numbers("--ratios", ratios, float, "0.3,0.5") if ratios else [None]
        engines = task_accuracy.at_endpoint(asked, samples, chosen)
    else:
        engines = task_accuracy.plan(_cases(configs, methods, ratios, common, baselines), asked, samples)
    sampling = Sampling(max_tokens, temperature, top_p, sampling_seed)
    task_accuracy.answer(out, task, model, engines, sampling, context.args, endpoint, concurrency)


@app.command(
    context_settings=PASS_THROUGH,
    options_metavar="[OPTIONS] [vLLM'S ENGINE FLAGS]",
    epilog=examples("kvllm eval tracking MODEL --methods kara,rkv,h2o --ratios 0.5,0.3,0.2,0.1 --out runs/tracking"),
)
def tracking(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a model trained on programs.")],
    out: Annotated[Path, typer.Option(help="Output folder for log and results; an unfinished run in it is continued.")],
    methods: Methods = None,
    ratios: Ratios = None,
    configs: Configs = None,
    common: Common = "{}",
    baselines: Annotated[str, typer.Option(help="Additional methods to measure; '' = none.")] = ",".join(BASELINES),
    programs: Annotated[int, typer.Option(help="Number of programs.", min=1)] = 1000,
    lines: Annotated[int, typer.Option(help="Lines per program; must match the model's training.", min=5)] = 160,
    asked: Annotated[int, typer.Option(help="Number of variables to ask for at the end.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Random seed of the programs.")] = 1,
) -> None:
    """Let a small model execute programs step by step, for which it needs its earlier results.

    The full cache is always included. The repository's benchmarks/small_model/train.py trains the model.
    """
    require("matplotlib", "scipy")
    from kvllm.measure.eval.tracking import answer

    cases = _cases(configs, methods, ratios, common, baselines)
    answer(out, model, cases, programs, lines, asked, seed, context.args)


@app.command(
    context_settings=PASS_THROUGH,
    options_metavar="[OPTIONS] [vLLM'S ENGINE FLAGS]",
    epilog=examples("kvllm eval chain MODEL --configs chain --half test --chains 24 --length 24 --out runs/chain"),
)
def chain(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's folder, or a name on the model hub.")],
    out: Annotated[Path, typer.Option(help="Output folder for log and results; an unfinished run in it is continued.")],
    data: Data = None,
    half: HalfOfTraces = None,
    chains: Annotated[int, typer.Option(help="Number of chains.", min=1)] = 24,
    length: Annotated[int, typer.Option(help="Problems per chain.", min=1)] = 24,
    format: Annotated[str, typer.Option(help="Prompt format: example, rules or restate.")] = "example",
    methods: Methods = None,
    ratios: Ratios = None,
    configs: Configs = None,
    common: Common = "{}",
    baselines: Annotated[str, typer.Option(help="Additional methods to measure; '' = none.")] = "random",
    cache_dtypes: Annotated[
        str, typer.Option(help="Also measure stock vLLM with these values of --kv-cache-dtype, such as fp8.")
    ] = "",
    samples: Annotated[int, typer.Option(help="Answers per chain.", min=1)] = 1,
    max_tokens: Annotated[int, typer.Option(help="Maximum answer length in tokens.", min=1)] = 12288,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 = greedy.", min=0)] = 0.6,
    top_p: Annotated[float, typer.Option(help="As in vLLM: total probability of the tokens to sample from.")] = 0.95,
    sampling_seed: SamplingSeed = None,
) -> None:
    """Solve many problems in one long answer and repeat all results at the end.

    The full cache is always included.
    """
    require("matplotlib", "scipy")
    from kvllm.measure.eval.chain import answer
    from kvllm.measure.eval.chains import make_chains
    from kvllm.measure.eval.engines import Sampling
    from kvllm.measure.eval.problems import load_problems

    asked = make_chains(load_problems("gsm8k", data), half, chains, length, format)
    cases = _cases(configs, methods, ratios, common, baselines)
    sampling = Sampling(max_tokens, temperature, top_p, sampling_seed)
    dtypes = [dtype for dtype in cache_dtypes.split(",") if dtype]
    answer(out, model, asked, cases, samples, dtypes, sampling, context.args)


@app.command(
    epilog=examples(
        "kvllm eval grade runs/math500/samples.jsonl",
    ),
)
def grade(
    log: Annotated[
        Path, typer.Argument(help="samples.jsonl of a run; the results next to it are rewritten.", exists=True)
    ],
) -> None:
    """Grade the answers of an `accuracy` run again."""
    require("math_verify", "matplotlib", "scipy")
    from kvllm.measure.eval.regrade import run

    run(log)


@app.command(
    epilog=examples(
        "kvllm eval calibrate --traces traces.jsonl --half train --model MODEL --out statistics.safetensors",
    ),
)
def calibrate(
    traces: TracesFile,
    model: TracedModel,
    out: Annotated[
        Path, typer.Option(help="File to write, for triattention's option `statistics`.", callback=in_a_folder)
    ],
    half: HalfOfTraces = None,
    limit: Annotated[int, typer.Option(help="Maximum number of traces.", min=1)] = 32,
    stride: Annotated[int, typer.Option(help="Use every N-th query.", min=1)] = 4,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Compute the query statistics that method triattention needs."""
    require("scipy")
    from kvllm.measure.eval.calibrate import run

    run(traces, model, out, half, limit, stride, *placement(device, dtype))


@app.command(
    "calibrate-layers",
    epilog=examples(
        "kvllm eval calibrate-layers --traces traces.jsonl --half train --model MODEL --out table.json",
    ),
)
def calibrate_layers(
    traces: TracesFile,
    model: TracedModel,
    out: Annotated[
        Path, typer.Option(help="File to write: a table for --retention-ratio, as JSON.", callback=in_a_folder)
    ],
    rule: Annotated[
        LayerRule, typer.Option(help="kl: move budget as long as KL falls; cake: by preference; pyramid: as pyramidkv.")
    ] = LayerRule.kl,
    ratio: Annotated[float, typer.Option(help="Mean retention ratio of the table.", min=0, max=1)] = 0.3,
    method: Annotated[str, typer.Option(help="Compression method.")] = "kara",
    common: Common = "{}",
    groups: Annotated[
        int | None,
        typer.Option(
            help="Number of layer groups, 2 to 4.", min=2, max=4, show_default="as many as possible of equal size"
        ),
    ] = None,
    steps: Annotated[
        str, typer.Option(help="For rule kl: amounts of ratio to move between groups, largest first.")
    ] = "0.1,0.05",
    half: HalfOfTraces = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N traces (of the half).", min=1)] = None,
    block_size: BlockSize = 16,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Find layer budgets for a model and write them as a table for --retention-ratio.

    Measure the table with `fidelity` on other traces.
    """
    require("scipy")
    from kvllm.measure.eval.calibrate_layers import run

    options = {**parse_json("--common", common), "method": method, "retention_ratio": ratio}
    sizes = parse_numbers("--steps", steps, float, "0.1,0.05")
    run(traces, model, out, rule.value, options, groups, sizes, half, limit, block_size, *placement(device, dtype))


set_panels(
    app,
    {
        "What to compare": ("methods", "ratios", "configs", "baselines", "caches", "bits", "sizes", "cache_dtypes"),
        "Sampling": ("max_tokens", "min_tokens", "temperature", "top_p", "sampling_seed"),
        "Output": ("json_file", "markdown_file", "plot_file"),
        "For experts": (
            *("common", "later", "stride", "steps", "seed", "prompt_tokens", "answer_tokens"),
            *("minutes", "log", "concurrency", "block_size", "device", "dtype"),
        ),
    },
)
