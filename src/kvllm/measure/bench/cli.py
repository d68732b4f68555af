"""`kvllm bench throughput` and `kvllm bench kernels`: the same options as the modules they call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from kvllm.measure.bench.spec import BenchSpec
from kvllm.options import parse_json

app = typer.Typer(no_args_is_help=True, help="Throughput of the engine, and time of each kernel.")
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here, as JSON.")]


def with_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every BenchSpec field but the model, and the spec they make up."""
    signature = inspect.signature(command, eval_str=True)
    options = [f for f in fields(BenchSpec) if f.name != "model"]

    @functools.wraps(command)
    def wrapped(model: str, **arguments: Any) -> None:
        given = {f.name: arguments.pop(f.name) for f in options}
        if given["engine_args"] is not None:
            given["engine_args"] = parse_json("--engine-args", given["engine_args"])
        chosen = {name: value for name, value in given.items() if value not in (None, [])}
        command(**arguments, spec=BenchSpec(model=model, **chosen))

    model = inspect.Parameter(
        "model",
        inspect.Parameter.KEYWORD_ONLY,
        default=BenchSpec.__dataclass_fields__["model"].default,
        annotation=Annotated[str, typer.Argument(help=BenchSpec.__dataclass_fields__["model"].metadata["help"])],
    )
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "spec"]
    parameters = [model, *map(_parameter, options), *own]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _parameter(field: Field[Any]) -> inspect.Parameter:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    name = str(field.type).removesuffix(" | None")
    kinds: dict[str, Any] = {"str": str, "int": int, "float": float, "list[str]": list[str], "list[int]": list[int]}
    kind: Any = bool if name == "bool" else kinds.get(name, str)
    flag = "--" + field.name.replace("_", "-")
    shown = False if default in (None, False, [], {}) else str(default)
    option = typer.Option(flag, help=field.metadata["help"], show_default=shown)
    empty = False if kind is bool else None
    annotation: Any = Annotated[kind if kind is bool else kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=annotation)


@app.command()
@with_spec
def serve(
    spec: BenchSpec,
    json_file: JsonFile = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the figures here, as PNG or SVG.")] = None,
) -> None:
    """Stock vLLM and KvLLM on the same requests, one engine process after the other."""
    from kvllm.measure.bench.throughput import bench_throughput

    result = bench_throughput(spec, json_file, plot_file)
    if any("error" in row for row in result["rows"]):
        raise typer.Exit(1)


@app.command()
def kernels(
    num_due: Annotated[list[int] | None, typer.Option(help="Requests due at once.", show_default="1 8 64")] = None,
    json_file: JsonFile = None,
) -> None:
    """Every kernel against the time that the device needs for its bytes or its arithmetic."""
    from kvllm.measure.bench.kernels import bench_kernels

    bench_kernels(num_due=tuple(num_due or (1, 8, 64)), json_path=json_file)
