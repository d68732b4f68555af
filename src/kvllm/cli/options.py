"""KvConfig on the command line: one flag per field, with the field's default and help; panels of `--help`."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from kvllm.config import PRESET_KEY, PRESETS, KvConfig
from kvllm.errors import UsageError
from kvllm.options import Option, options_of, parse_json

# Unknown arguments are passed on to vLLM's own parser. As there, flags may be written with underscores.
PASS_THROUGH: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "token_normalize_func": lambda flag: flag.replace("_", "-"),
}
# Panels of --help. A new field is shown among the experts' options unless EVERYDAY lists it.
PANEL, EXPERT_PANEL = "Compression", "Compression, for experts"
EVERYDAY = ("method", "retention_ratio", "survivor_bits", "request_ratios", "request_methods")
TYPES = {"string": str, "integer": int, "number": float}  # all others are JSON
# vLLM uses these flag names for something else.
PREFIXED = ("seed",)


def in_a_folder(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Callback for output files: raise UsageError, before any work starts, if the folder does not exist."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{param.opts[0]} {path}: the folder {path.parent} does not exist; create it first.")
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file as JSON.", callback=in_a_folder)
]


def set_panels(app: typer.Typer, panels: Mapping[str, Collection[str]]) -> None:
    """Group the options of all of the app's commands in `--help`; call it after the commands are declared.

    panels: parameter names under each panel's title, in display order; all other options stay under "Options", first
    """
    panel_of = {name: panel for panel, names in panels.items() for name in names}
    order = list(panels)

    class Grouped(TyperCommand):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for parameter in self.params:
                if isinstance(parameter, TyperOption) and parameter.name in panel_of:
                    parameter.rich_help_panel = panel_of[parameter.name]
            self.params.sort(key=lambda p: order.index(panel_of[p.name]) if p.name in panel_of else -1)

    for command in app.registered_commands:
        command.cls = Grouped


@contextmanager
def suggesting_flags(arguments: Sequence[str]) -> Iterator[None]:
    """After vLLM's parser has rejected `arguments`, print which flag of ours a misspelt one is close to."""
    try:
        yield
    except SystemExit as e:
        if not e.code:  # --help
            raise
        ours = [flag(name) for name in (PRESET_KEY, *options_of(KvConfig))]
        for name in (argument.partition("=")[0].replace("_", "-") for argument in arguments):
            if name.startswith("--") and (close := get_close_matches(name, ours, 1, 0.81)):
                typer.echo(f"{name}: did you mean {close[0]}?", err=True)
        raise


def examples(*commands: str) -> str:
    """Epilog of a command's help: command lines that work as printed, separated by blank lines as typer requires."""
    return "\n\n".join(["Examples:", *(command.replace("[", "\\[") for command in commands)])


def flag(field_name: str) -> str:
    """The flag of a KvConfig field, such as --retention-ratio."""
    return "--" + ("kv-" if field_name in PREFIXED else "") + field_name.replace("_", "-")


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command a flag for every KvConfig field.

    The command's argument `options` gets a dict of only those fields that the user set. The command's annotations are
    evaluated, so its module must import every name that they use.
    """
    signature = inspect.signature(command, eval_str=True)
    # typer passes its context to one parameter only.
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
    """Whether the user set this parameter. Defaults must not override --additional-config."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def parse(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert flag values to KvConfig fields: JSON for fields that are neither strings nor numbers."""
    options = options_of(KvConfig)
    return {
        name: value if name == PRESET_KEY or options[name].type in TYPES else _parsed(options[name], value)
        for name, value in given.items()
    }


def _parsed(option: Option, text: str) -> Any:
    """Parse JSON; a union type (no single JSON type) also accepts any number that Python's float() does."""
    if not option.type and not text.lstrip().startswith("{"):
        try:
            return float(text)
        except ValueError:
            return text  # KvConfig raises the error
    return parse_json(flag(option.name), text)


def shown(default: Any) -> str:
    """A default value as the user would write it."""
    return default if isinstance(default, str) else json.dumps(default)


def _preset_parameter() -> inspect.Parameter:
    means = "; ".join(
        f"{name} = " + " ".join(f"{flag(option)} {value}" for option, value in preset.items())
        for name, preset in PRESETS.items()
    )
    help = f"Preset: how many times smaller compressed windows are; saves memory on GPUs only. {means}."
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
