"""The table of docs/methods.md is complete, and the example of docs/contributing/method.md works as printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kvllm.methods
from kvllm.config import KvConfig
from kvllm.methods import make_method, methods
from tests.methods.windows import random_window

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = DOCS / "contributing" / "method.md"
EXAMPLE, EXAMPLES_TEST = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


def test_the_table_has_every_method():
    assert sorted(re.findall(r"^\| `(\w+)` \|", (DOCS / "methods.md").read_text(), flags=re.MULTILINE)) == list(
        methods()
    )


def test_the_example_works(monkeypatch):
    assert len((EXAMPLE + EXAMPLES_TEST).splitlines()) < 60
    monkeypatch.setattr(kvllm.methods, "_REGISTRY", dict(methods()))
    module = ModuleType("knorm")
    monkeypatch.setitem(sys.modules, "knorm", module)  # where dataclasses look for it
    names = vars(module)
    names.update(random_window=random_window, pytest=pytest)
    exec(compile(EXAMPLE + EXAMPLES_TEST, str(GUIDE), "exec", dont_inherit=True), names)
    tests = [f for name, f in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    assert make_method(KvConfig(method="knorm")) == names["KNorm"]()
    with pytest.raises(ValueError, match=r"order=0: must be a number in \[1, 100\]"):
        make_method(KvConfig(method="knorm", method_options={"order": 0}))
