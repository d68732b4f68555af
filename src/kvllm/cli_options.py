"""KvConfig on the command line: one flag a field, with the defaults and the help that the field itself has."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

from kvllm.config import KvConfig

PANEL = "Compression"
TYPES = {"str": str, "int": int, "float": float}


def flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def default_of(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command a flag for every KvConfig field, and pass what was set as its `config` argument.

    `config` is a dict with the fields that differ from a flag left out: the user's choice, to be merged or checked.
    """
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        given = {f.name: arguments.pop(f.name) for f in fields(KvConfig)}
        command(**arguments, config=parse({name: value for name, value in given.items() if value is not None}))

    parameters = [p for p in signature.parameters.values() if p.name != "config"]
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters + [_parameter(f) for f in fields(KvConfig)]
    )
    wrapped.__annotations__ = {p.name: p.annotation for p in wrapped.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return wrapped


def parse(given: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line as KvConfig fields: JSON where a field is a mapping."""
    for f in fields(KvConfig):
        if f.name in given and str(f.type) not in TYPES:
            try:
                given[f.name] = json.loads(given[f.name])
            except json.JSONDecodeError as e:
                raise ValueError(f"{flag(f.name)} {given[f.name]}: not valid JSON ({e}).") from e
    return given


def _parameter(field: Field[Any]) -> inspect.Parameter:
    default = default_of(field)
    shown = default if str(field.type) in TYPES else json.dumps(default)
    # None stands for "left out", so that a choice made elsewhere (--additional-config) is not overridden.
    option = typer.Option(
        flag(field.name), help=field.metadata["help"], show_default=str(shown), rich_help_panel=PANEL
    )
    annotation = Annotated[TYPES.get(str(field.type), str) | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
