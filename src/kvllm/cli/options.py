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
from kvllm.options import Option, options_of, parse_json

# What typer does not know goes to vLLM, which has its own parser and its own messages.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here, as JSON.")]
PANEL = "Compression"
TYPES = {"string": str, "integer": int, "number": float}  # all others are JSON
# vLLM has flags of these names, and they mean something else.
PREFIXED = ("seed",)


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

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in (PRESET_KEY, *options_of(KvConfig))}
        command(**arguments, options=parse({name: value for name, value in given.items() if value is not None}))

    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "options"]
    parameters = [*own, _preset_parameter(), *map(_parameter, options_of(KvConfig).values())]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


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
    sets = "; ".join(
        f"{name}: " + ", ".join(f"{flag(option)} {value}" for option, value in preset.items())
        for name, preset in PRESETS.items()
    )
    declared = typer.Option(
        flag(PRESET_KEY), help=f"How many times smaller old windows are stored ({sets}).", rich_help_panel=PANEL
    )
    annotation: Any = Annotated[str | None, declared]
    return inspect.Parameter(PRESET_KEY, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(option: Option) -> inspect.Parameter:
    declared = typer.Option(
        flag(option.name), help=option.help, show_default=shown(option.default), rich_help_panel=PANEL
    )
    # None stands for "left out", so that a choice made elsewhere (--additional-config) is not overridden.
    kind: Any = TYPES.get(option.type, str)
    annotation: Any = Annotated[kind | None, declared]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
