"""What an installation carries: code, and no data."""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kvllm"
MOST_BYTES = 300 * 2**10


def test_the_package_is_small_and_carries_no_data() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".py", ".json", ".typed", ".html"}
    assert [path.name for path in files if path.suffix == ".html"] == ["page.html"]  # of `kvllm inspect`: code
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:  # as wheels are
        for path in files:
            archive.write(path, path.relative_to(PACKAGE))
    assert packed.tell() < MOST_BYTES
    assert all(path.stat().st_size < 4096 for path in files if path.suffix == ".json")


def test_what_measuring_needs_is_no_dependency_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = " ".join(project["dependencies"])
    assert not [name for name in ("matplotlib", "scipy", "math-verify", "openai", "gguf") if name in needed]
    assert all(name in " ".join(extras["eval"]) for name in ("matplotlib", "scipy", "math-verify", "openai"))
    assert "matplotlib" in " ".join(extras["bench"])
