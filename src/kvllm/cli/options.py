"""KvConfig on the command line: one flag a field, with the defaults and the help that the field itself has."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvllm.config import PRESET_KEY, PRESETS, KvConfig
from kvllm.errors import UsageError
from kvllm.options import Option, options_of, parse_json

# What typer does not know goes to vLLM, which has its own parser and its own messages.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
# In help the options that most users need stand apart from the others; a new field is among the others.
PANEL, EXPERT_PANEL = "Compression", "Compression, for experts"
EVERYDAY = ("method", "retention_ratio", "survivor_bits", "request_ratios")
TYPES = {"string": str, "integer": int, "number": float}  # all others are JSON
# vLLM has flags of these names, and they mean something else.
PREFIXED = ("seed",)


def in_a_folder(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """For options that name a file to write: refuse, before work starts, one whose folder is missing."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{param.opts[0]} {path}: there is no folder {path.parent}; make it first.")
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.", callback=in_a_folder)
]


def examples(*commands: str) -> str:
    """The epilog of a command's help: command lines that work as printed. Empty lines part them, as typer wants it."""
    return "\n\n".join(["Examples:", *(command.replace("[", "\\[") for command in commands)])


def flag(field_name: str) -> str:
    """The flag of a KvConfig field, such as --retention-ratio."""
    return "--" + ("kv-" if field_name in PREFIXED else "") + field_name.replace("_", "-")


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command a flag for every KvConfig field.

    The command takes an argument `options`, a dict of the fields that were set and no others, so that it can tell
    the user's choice from a default. Its annotations must be evaluated: no `from __future__ import annotations` names
    that its module does not hold.
    """
    signature = inspect.signature(command, eval_str=True)
    # typer hands out its context under one name only.
    takes_context = [p.name for p in signature.parameters.values() if p.annotation is typer.Context]
    context_name = takes_context[0] if takes_context else "kvllm_context"

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        context: typer.Context = arguments[context_name] if takes_context else arguments.pop(context_name)
        values = {name: arguments.pop(name) for name in (PRESET_KEY, *options_of(KvConfig))}
        given = {name: value for name, value in values.items() if _was_given(context, name)}
        command(**arguments, options=parse(given))

    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "options"]
    declared = sorted(options_of(KvConfig).values(), key=lambda option: option.name not in EVERYDAY)
    parameters = [*own, _preset_parameter(), *map(_parameter, declared)]
    if not takes_context:
        parameters.append(inspect.Parameter(context_name, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _was_given(context: typer.Context, name: str) -> bool:
    """Whether the user set this parameter; a default must not override what --additional-config says."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def parse(given: Mapping[str, Any]) -> dict[str, Any]:
    """KvConfig fields from the flags' values: JSON where a field is neither text nor a number."""
    options = options_of(KvConfig)
    return {
        name: value if name == PRESET_KEY or options[name].type in TYPES else _parsed(options[name], value)
        for name, value in given.items()
    }


def _parsed(option: Option, text: str) -> Any:
    """A JSON text, or where the option may be a number too (it has no one type) any that Python reads."""
    if not option.type and not text.lstrip().startswith("{"):
        try:
            return float(text)
        except ValueError:
            return text  # which the option refuses by name
    return parse_json(flag(option.name), text)


def shown(default: Any) -> str:
    """A default as the user would write it."""
    return default if isinstance(default, str) else json.dumps(default)


def _preset_parameter() -> inspect.Parameter:
    means = "; ".join(
        f"{name} = " + " ".join(f"{flag(option)} {value}" for option, value in preset.items())
        for name, preset in PRESETS.items()
    )
    help = f"How many times smaller old windows are stored; needs a GPU to save memory. {means}."
    declared = typer.Option(
        flag(PRESET_KEY),
        help=help,
        rich_help_panel=PANEL,
        metavar="|".join(PRESETS),
        autocompletion=lambda: list(PRESETS),
    )
    annotation: Any = Annotated[str | None, declared]
    return inspect.Parameter(PRESET_KEY, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = TYPES.get(option.type, str)
    default = option.default if option.type in TYPES else shown(option.default)
    declared = typer.Option(
        flag(option.name),
        help=option.help,
        show_default=default != "",
        rich_help_panel=PANEL if option.name in EVERYDAY else EXPERT_PANEL,
    )
    annotation: Any = Annotated[kind, declared]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
