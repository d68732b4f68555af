"""KvConfig on the command line: one flag a field, with the defaults and the help that the field itself has."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

from kvllm.config import KvConfig

PANEL = "Compression"
TYPES = {"str": str, "int": int, "float": float}
# vLLM has flags of these names, and they mean something else.
PREFIXED = ("seed",)


def flag(field_name: str) -> str:
    """The flag of a KvConfig field, such as --retention-ratio."""
    return "--" + ("kv-" if field_name in PREFIXED else "") + field_name.replace("_", "-")


def default_of(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command a flag for every KvConfig field.

    The command takes an argument `options`, a dict of the fields that were set and no others, so that it can tell
    the user's choice from a default. Its annotations must be evaluated: no `from __future__ import annotations` names
    that its module does not hold.
    """
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        given = {f.name: arguments.pop(f.name) for f in fields(KvConfig)}
        command(**arguments, options=parse({name: value for name, value in given.items() if value is not None}))

    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "options"]
    parameters = own + [_parameter(f) for f in fields(KvConfig)]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def parse(given: Mapping[str, Any]) -> dict[str, Any]:
    """KvConfig fields from the flags' values: JSON where a field is a mapping."""
    parsed = dict(given)
    for f in fields(KvConfig):
        if f.name in parsed and str(f.type) not in TYPES:
            try:
                parsed[f.name] = json.loads(parsed[f.name])
            except json.JSONDecodeError as e:
                raise ValueError(f"{flag(f.name)} {parsed[f.name]}: not valid JSON ({e}).") from e
    return parsed


def _parameter(field: Field[Any]) -> inspect.Parameter:
    default = default_of(field)
    shown = str(default) if str(field.type) in TYPES else json.dumps(default)
    option = typer.Option(flag(field.name), help=field.metadata["help"], show_default=shown, rich_help_panel=PANEL)
    # None stands for "left out", so that a choice made elsewhere (--additional-config) is not overridden.
    kind: Any = TYPES.get(str(field.type), str)
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
