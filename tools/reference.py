"""Generate the pages of docs/ that come from the source: commands with their options, and refusals.

    python -m tools.reference     writes both; `make reference` does

typer can generate such a page too, but its wording changes between releases, and it would repeat the compression
options six times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from kvllm.__main__ import app
from kvllm.cli.options import EXPERT_PANEL, PANEL
from tools import refusals

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
SHARED = (PANEL, EXPERT_PANEL)
LEFT_OUT = {"help", "install_completion", "show_completion"}
HEAD = """<!-- Written by `make reference` from the commands themselves. -->
# Command reference

What `kvllm COMMAND --help` prints. How the commands behave is in [Command line](cli.md); what is refused, in
[Every refusal](refusals.md).

`kvllm --install-completion` sets up completion of commands and options for your shell.
"""
COMPRESSION = """## Options of compression

All commands that compress take these. In JSON and Python (`additional_config={"kvllm": ...}`) they have the same names
with underscores, and `--kv-seed` is `seed`.
"""


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All leaf commands by full name, in the order of `--help`."""
    if hasattr(command, "commands"):
        for sub, inner in command.commands.items():
            yield from commands(inner, f"{name} {sub}")
    else:
        yield name, command


def panel_of(parameter: Any) -> str:
    return getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument(parameter) else "Options")


def is_argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"


def shown_default(parameter: Any) -> str:
    """The default as shown by `--help`; empty if it shows none."""
    if parameter.required:
        return "required"
    show, default = getattr(parameter, "show_default", True), parameter.default
    if isinstance(show, str):
        return show
    if not show or default is None or default is False or default == "" or callable(default):
        return ""
    return f"`{getattr(default, 'value', default)}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(parameters: list[Any]) -> list[str]:
    lines = ["| option | default | |", "| --- | --- | --- |"]
    for parameter in parameters:
        names = [parameter.name.upper()] if is_argument(parameter) else [*parameter.opts, *parameter.secondary_opts]
        shown = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {shown} | {cell(shown_default(parameter))} | {cell(parameter.help or '')} |")
    return lines


def panels(parameters: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for parameter in sorted(parameters, key=lambda p: not is_argument(p)):
        found.setdefault(panel_of(parameter), []).append(parameter)
    return found


def section(name: str, command: Any) -> list[str]:
    """One command: description, usage, options by panel, and examples."""
    summary, _, rest = (command.help or "").strip().partition("\n\n")
    own = [p for p in command.params if p.name not in LEFT_OUT and panel_of(p) not in SHARED]
    takes_compression = any(panel_of(p) in SHARED for p in command.params)
    arguments = " ".join(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in own if is_argument(p))
    usage = " ".join(filter(None, [name, arguments, command.options_metavar or "[OPTIONS]"]))
    lines = ["", f"## {name}", "", " ".join(summary.split()), "", f"    {usage}", ""]
    if rest:
        lines += [" ".join(rest.split()), ""]
    for panel, parameters in panels(own).items():
        lines += ([f"**{panel}**", ""] if panel not in ("Options", "Arguments") else []) + table(parameters) + [""]
    if takes_compression:
        lines += ["All [options of compression](#options-of-compression) as well.", ""]
    if command.epilog:
        title, *examples = command.epilog.split("\n\n")
        lines += [title, "", *("    " + example.replace("\\[", "[") for example in examples)]
    return lines


def page() -> str:
    """docs/commands.md."""
    found = list(commands(typer.main.get_command(app), "kvllm"))
    shared = panels([p for _, command in found if command.name == "serve" for p in command.params])
    lines = [HEAD]
    lines += ["| command | |", "| --- | --- |"]
    for name, command in found:
        anchor = name.replace(" ", "-")
        lines.append(f"| [`{name}`](#{anchor}) | {cell((command.help or '').partition(chr(10) * 2)[0])} |")
    for name, command in found:
        lines += section(name, command)
    lines += ["", COMPRESSION]
    for panel in SHARED:
        lines += [f"**{panel}**", "", *table(shared[panel]), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def write() -> None:
    PAGE.write_text(page())
    refusals.PAGE.write_text(refusals.page())


if __name__ == "__main__":
    write()
