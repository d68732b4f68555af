"""`kvllm bench`: commands with one option per field of BenchSpec or Shape."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from kvllm.cli.options import JsonFile, examples, in_a_folder, set_panels
from kvllm.errors import UsageError
from kvllm.measure.bench.kernel_shape import Shape
from kvllm.measure.bench.spec import BenchSpec
from kvllm.measure.extras import require
from kvllm.options import parse_json

app = typer.Typer(no_args_is_help=True, help="Measure the engine's throughput and the time of each kernel.")
KINDS: dict[str, Any] = {
    "str": str, "int": int, "float": float, "bool": bool, "list[str]": list[str], "list[int]": list[int]
}  # fmt: skip


def with_fields(name: str, cls: type[Any], positional: str | None = None) -> Callable[..., Callable[..., None]]:
    """Give a command an option for every field of `cls`; its argument `name` gets a dict of those that the user set.

    positional: the field that becomes a positional argument
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def wrapped(**arguments: Any) -> None:
            given = {f.name: arguments.pop(f.name) for f in fields(cls)}
            command(**arguments, **{name: {key: value for key, value in given.items() if value not in (None, [])}})

        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != name]
        parameters = [*(_parameter(f, f.name == positional) for f in fields(cls)), *own]
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def _parameter(field: Field[Any], positional: bool) -> inspect.Parameter:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    kind = KINDS.get(str(field.type).removesuffix(" | None"), str)  # all others are JSON
    shown: bool | str = False
    if default is not None and default is not False and default not in ([], {}):
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    help = field.metadata["help"]
    if positional:
        declared: Any = typer.Argument(help=help, show_default=shown)
    else:
        flag = "--" + field.name.replace("_", "-")  # an explicit name, so that booleans get no --no- form
        declared = typer.Option(flag, help=help, show_default=shown)
    # None: not given.
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


@app.command(
    epilog=examples(
        "kvllm bench throughput qwen3-8b --config stock --config kara:0.3 --concurrency 64 --json out.json",
        "kvllm bench throughput qwen3-8b --config kara:0.4375:survivor_bits=4 --concurrency 256 --stagger",
    ),
)
@with_fields("given", BenchSpec, positional="model")
def throughput(
    given: dict,  # type: ignore[type-arg]
    spec: Annotated[
        str | None, typer.Option(help="All options as JSON, or a JSON file, instead of the other options.")
    ] = None,
    json_file: JsonFile = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Plot the results to this file (.png, .svg).", callback=in_a_folder)
    ] = None,
) -> None:
    """Compare stock vLLM and KvLLM on the same requests, one engine process after another."""
    if plot_file:
        require("matplotlib")
    from kvllm.measure.bench.throughput import bench_throughput

    if spec is not None:
        if given:
            raise UsageError(f"--spec replaces all other options, so {', '.join(given)} cannot be combined with it.")
        given = read_spec(spec)
    elif "engine_args" in given:
        given["engine_args"] = parse_json("--engine-args", given["engine_args"])
    result = bench_throughput(BenchSpec.from_dict(given), json_file, plot_file)
    if any("error" in row for row in result["rows"]):
        raise typer.Exit(1)


def read_spec(text: str) -> dict[str, Any]:
    """Fields of BenchSpec from a JSON object or the path of a file with one."""
    if not text.lstrip().startswith("{"):
        if not Path(text).is_file():
            raise UsageError(f"--spec {text}: neither a JSON object nor an existing file.")
        text = Path(text).read_text()
    parsed = parse_json("--spec", text)
    if not isinstance(parsed, dict):
        raise UsageError(f"--spec {json.dumps(parsed)[:80]}: expected a JSON object.")
    return parsed


@app.command(epilog=examples("kvllm bench kernels --json kernels.json"))
@with_fields("given", Shape)
def kernels(
    given: dict,  # type: ignore[type-arg]
    num_due: Annotated[
        list[int] | None, typer.Option(help="Requests compressed in the same step (repeatable).", show_default="1 8 64")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare each kernel's time with the device's limit for its memory traffic or arithmetic."""
    from kvllm.measure.bench.kernels import bench_kernels

    bench_kernels(Shape(**given), num_due=tuple(num_due or (1, 8, 64)), json_path=json_file)


set_panels(
    app,
    {
        "The engine": (
            *("max_num_seqs", "max_model_len", "max_num_batched_tokens", "gpu_memory_utilization", "num_gpu_blocks"),
            *("block_size", "dtype", "enforce_eager", "capture_sizes", "engine_args"),
        ),
        "Output": ("json_file", "plot_file"),
        "For experts": (
            "stagger",
            "max_seconds",
            "profile_steps",
            "warmup_seconds",
            "random_experts",
            "temperature",
            "seed",
            "spec",
        ),
    },
)
