"""`kvllm methods`: what each compression method does, from its class and the first line of its module."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from dataclasses import asdict, dataclass

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvllm.cli.options import flag, shown
from kvllm.methods import SHARED_OPTIONS, method_class
from kvllm.methods import methods as registry
from kvllm.options import Option, options_of

SOURCE = re.compile(r"\((arXiv:|(?=github\.com/))([\w./-]+)\)")  # in the first line of a method's module
SITE = {"arXiv:": "https://arxiv.org/abs/", "": "https://"}
NEW_PARAGRAPH = re.compile(r"- |[A-Z]\w+:(\s|$)")  # a list's entry, or a heading such as "Differs:"


@dataclass(frozen=True)
class Description:
    """What `kvllm methods` says about one method.

    title:   the first line of its module, with the method's full name; "" if it has none
    source:  the address of its paper or repository; "" if its title names none
    details: the paragraphs of its docstring after the summary
    options: all of its options, those included that it shares with other methods
    command: a command line to try it
    """

    name: str
    title: str
    source: str
    summary: str
    details: list[str]
    options: list[Option]
    command: str


def describe(name: str) -> Description:
    """Raises UsageError if there is no such method."""
    cls = method_class("method", name)
    title = (sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")[0]
    found = SOURCE.search(title)
    summary, *details = _paragraphs(inspect.cleandoc(cls.__doc__ or ""))
    options = list(options_of(cls).values())
    source = SITE[found[1]] + found[2] if found else ""
    return Description(name, title, source, summary, details, options, _command(name, options))


def describe_all() -> list[Description]:
    return [describe(name) for name in registry()]


def to_json(methods: list[Description]) -> str:
    return json.dumps([asdict(method) for method in methods], indent=2) + "\n"


def table(methods: list[Description]) -> Table:
    """All methods with their own options."""
    made = Table("method, its options", "default", "accepts", "what it keeps, what the option does")
    for method in methods:
        made.add_section()
        made.add_row(Text(method.name, "bold"), "", "", Text(method.summary, "bold"))
        for option in method.options:
            if option.name not in SHARED_OPTIONS:
                made.add_row(f"  {option.name}", *_cells(option))
    return made


def page(method: Description) -> Group:
    """One method in full, but for the command to try it, which must not be wrapped."""
    parts: list[Text | Padding | Table] = [Text(method.title or method.name, "bold"), Text("")]
    for paragraph in (method.summary, *method.details):
        parts.append(Padding(Text(paragraph), (0, 0, 0, 2 if paragraph.startswith("- ") else 0)))
    if method.source:
        parts += [Text(""), Text(f"Source: {method.source}")]
    parts.append(Text(""))
    if method.options:
        made = Table("in --method-options, or a flag", "default", "accepts", "what it does")
        for option in method.options:
            made.add_row(flag(option.name) if option.name in SHARED_OPTIONS else option.name, *_cells(option))
        parts.append(made)
    else:
        parts.append(Text("It has no options of its own."))
    return Group(*parts)


def is_required(option: Option) -> bool:
    """Whether a method cannot be built without this option: the path of a file, which has no default."""
    return option.default == ""


def _cells(option: Option) -> list[Text]:
    """Default, accepted values and help. Text, so that brackets as in [0, 1] are not parsed as markup."""
    default = "required" if is_required(option) else shown(option.default)
    return [Text(default), Text(option.accepts), Text(option.help)]


def _command(name: str, options: list[Option]) -> str:
    """Generates enough tokens that the default window is compressed several times."""
    command = f"kvllm generate MODEL --prompt 'Count to 300.' --max-tokens 800 --method {name}"
    if required := {option.name: "FILE" for option in options if is_required(option)}:
        command += f" --method-options {shlex.quote(json.dumps(required))}"
    return command


def _paragraphs(text: str) -> list[str]:
    """The paragraphs and list entries of a docstring, each as one line."""
    found = [""]
    for line in text.splitlines():
        if not line or NEW_PARAGRAPH.match(line):
            found.append("")
        found[-1] = f"{found[-1]} {line.strip()}".strip()
    return [paragraph for paragraph in found if paragraph] or [""]
