"""The table of docs/methods.md is complete, and the example of docs/contributing/method.md works as printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvllm.methods
from kvllm.config import KvConfig
from kvllm.methods import make_method, methods

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = DOCS / "contributing" / "method.md"
EXAMPLE, EXAMPLES_TEST = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


def test_the_table_has_every_method():
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "methods.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == list(methods()), "each method has one row in the table of docs/methods.md"


def test_the_example_works(monkeypatch):
    assert len((EXAMPLE + EXAMPLES_TEST).splitlines()) < 60
    others = {name: cls for name, cls in methods().items() if name != "knorm"}  # there, if somebody follows the guide
    monkeypatch.setattr(kvllm.methods, "_REGISTRY", others)
    module = ModuleType("kvllm.methods.knorm")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses and the test look for it
    exec(compile(EXAMPLE, str(GUIDE), "exec", dont_inherit=True), vars(module))
    names: dict[str, Any] = {}
    exec(compile(EXAMPLES_TEST, str(GUIDE), "exec", dont_inherit=True), names)
    tests = [f for name, f in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    assert make_method(KvConfig(method="knorm")) == module.KNorm()
    with pytest.raises(ValueError, match=r"order=0: must be a number in \[1, 100\]"):
        make_method(KvConfig(method="knorm", method_options={"order": 0}))
