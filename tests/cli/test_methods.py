"""`kvllm methods METHOD`: one method in full."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kvllm.methods
from kvllm import __main__ as cli
from kvllm.cli.app import console
from kvllm.cli.methods import Description, _paragraphs, describe, describe_all, is_required
from kvllm.cli.options import flag
from kvllm.errors import UsageError
from kvllm.methods import SHARED_OPTIONS, build, checked_config, methods

ALL = {method.name: method for method in describe_all()}
TABLE = Path(__file__).parents[2] / "docs" / "methods.md"


def printed(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(console, "width", 500)
    return CliRunner().invoke(cli.app, ["methods", name], catch_exceptions=False).stdout


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_a_method_is_shown_in_full(method: Description, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = printed(method.name, monkeypatch)
    for words in (method.title, method.summary, method.source, *method.details, f"    {method.command}\n"):
        assert words in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [flag(o.name) if o.name in SHARED_OPTIONS else o.name for o in method.options]
    assert [row[3] for row in rows] == [option.help for option in method.options]


def test_the_source_is_that_of_the_documentation() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", TABLE.read_text(), flags=re.MULTILINE)
    for name, source in rows:
        named = re.search(r"arXiv (\d{4}\.\d{5})|(github\.com/\S+)", source)
        wanted = named and (f"https://arxiv.org/abs/{named[1]}" if named[1] else f"https://{named[2]}")
        assert ALL[name].source == (wanted or ""), name


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_the_command_names_every_option_that_is_required(method: Description) -> None:
    """A method is refused for a missing file, or for nothing at all."""
    words = shlex.split(method.command)
    assert words[:2] == ["kvllm", "generate"] and words[words.index("--method") + 1] == method.name
    given = json.loads(words[words.index("--method-options") + 1]) if "--method-options" in words else {}
    assert list(given) == [option.name for option in method.options if is_required(option)]
    if not given:
        assert checked_config({"method": method.name}).method == method.name
        return
    with pytest.raises(UsageError, match=f"{next(iter(given))}='': required"):
        build(methods()[method.name], method.name, "method_options", {})
    with pytest.raises(UsageError, match="FILE"):
        checked_config({"method": method.name, "method_options": given})


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match="method='kaar': no such method; did you mean 'kara'"):
        cli.app(["methods", "kaar"], standalone_mode=False)


def test_a_method_of_the_users_own_needs_no_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = type("Plain", (methods()["recent"],), {"__doc__": None, "__module__": __name__})
    monkeypatch.setitem(kvllm.methods._REGISTRY, "plain", cls)
    made = describe("plain")
    assert (made.title, made.source, made.summary) == (__doc__.strip(), "", "")


def test_paragraphs_are_unwrapped() -> None:
    text = "Keep some.\n\nSame: one\nline.\nDiffers:\n- a\n  b\n- c"
    assert _paragraphs(text) == ["Keep some.", "Same: one line.", "Differs:", "- a b", "- c"]
