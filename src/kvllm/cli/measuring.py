"""Stand-ins for the commands of kvllm-measure if it is not installed; each explains how to install it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec

import typer

import kvllm
from kvllm.cli.options import PASS_THROUGH
from kvllm.errors import UsageError

INSTALL = "uv pip install 'kvllm[measure]'; in a checkout: uv pip install '.[measure]'"
PANEL = "Not installed; the extra 'measure' adds"
COMMANDS = {
    "bench": "Measure the engine's throughput and the time of each kernel.",
    "eval": "Measure how compression changes a model's output.",
    "inspect": "Write an HTML page that shows which tokens of a text each compression kept. It works offline.",
    "tune": "Find the best settings for your model and texts, given a wanted saving or an accepted loss.",
    "demo": "Compare stock vLLM with KvLLM, live, on a dozen requests that exceed the KV pool.",
}


def why_missing() -> str | None:
    """Why the commands that measure cannot run; None if they can."""
    try:
        version = metadata.version("kvllm-measure")
    except metadata.PackageNotFoundError:
        version = kvllm.__version__  # a development install reads its code from src
    if version != kvllm.__version__:
        return f"kvllm-measure {version} does not fit kvllm {kvllm.__version__}; install the same version: {INSTALL}"
    found = find_spec("kvllm.measure")
    if found is None or found.origin is None:  # None: a folder that an uninstalled package left
        return f"this needs the package kvllm-measure, not installed here; install it: {INSTALL}"
    return None


def add_stand_ins(app: typer.Typer, why: str) -> None:
    """Add commands that fail with `why` for any arguments, including --help."""
    for name, help in COMMANDS.items():
        options = dict(help=help, rich_help_panel=PANEL, context_settings=PASS_THROUGH, add_help_option=False)
        app.command(name, **options)(_stand_in(name, why))  # type: ignore[arg-type]


def _stand_in(name: str, why: str) -> Callable[[typer.Context], None]:
    def refuse(context: typer.Context) -> None:
        raise UsageError(f"kvllm {name}: {why}.")

    return refuse
