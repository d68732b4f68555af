"""The kernel of docs/contributing/kernel.md works as printed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "contributing" / "kernel.md"
IMPORTS = "import pytest\nimport torch\nimport triton\nimport triton.language as tl\nfrom torch import Tensor\n\n\n"


def test_the_example_works(tmp_path: Path, device: str) -> None:
    kernel, test = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    path = tmp_path / "keys_norm.py"  # Triton reads the source of a kernel from its file
    path.write_text(IMPORTS + kernel + "\n\n" + test)
    spec = importlib.util.spec_from_file_location("keys_norm", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for sizes in module.test_keys_norm.pytestmark[0].args[1]:
        module.test_keys_norm(*sizes, device)
