"""The seam: what we use of vLLM is declared and is what we know; without configuration nothing changes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import vllm

from kvllm.engine import plugin
from kvllm.engine.seam import PATCHES, RELEASES, SEAM, apply_patches
from kvllm.engine.touch import Addition, Assignment, Import, Override, Patch, Read, Touch
from tools.check_seam import Check, changed_bodies, check_project, installed, main
from tools.syntax_tree import Tree


def test_the_declarations_hold_for_the_installed_vllm() -> None:
    assert check_project(installed()).problems == []


def test_every_declaration_says_why() -> None:
    for touch in SEAM:
        assert touch.why and touch.drop_when and touch.names and set(touch.releases) <= set(RELEASES), touch


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.target.partition(":")[2])
def test_the_target_has_the_parameters_we_know(patch: Patch) -> None:
    """The imported function, decorators and all, has the parameters that its source has."""
    original = inspect.unwrap(patch.resolve()[2])
    (declared,) = patch.paths.values()
    assert declared is not None
    assert [p.name for p in inspect.signature(original).parameters.values()] == [
        parameter.partition("=")[0] for parameter in declared.split(", ")
    ]


def test_patches_apply_once() -> None:
    apply_patches()
    first = [patch.resolve()[2] for patch in PATCHES]
    apply_patches()
    assert [patch.resolve()[2] for patch in PATCHES] == first
    assert all(vars(patch.resolve()[2])["kvllm_patch"] == patch.target for patch in PATCHES)


@pytest.mark.parametrize("modules", ["kvllm, kvllm.config, kvllm.layout", "kvllm.engine.seam"])
def test_import_loads_no_vllm(modules: str) -> None:
    code = f"import sys, {modules}; sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.34.0rc1", "1.32.0", "dev"])
def test_another_vllm_is_refused_by_name_once_configured(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr("vllm.version.__version__", version)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self, *args, **kwargs: "stock")
    plugin.register()
    plain = EngineArgs.__new__(EngineArgs)
    plain.additional_config = {}
    assert plain.create_engine_config() == "stock"
    plain.additional_config = {"kvllm": {}}
    with pytest.raises(ValueError, match=f"vllm=={version}.* vLLM 0.32 and 0.33"):
        plain.create_engine_config()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0", "0.33.0+cpu", "0.33.1rc1"])
def test_supported_versions(version: str) -> None:
    assert plugin.is_supported(version)


def test_the_installed_vllm_is_a_supported_one() -> None:
    assert plugin.is_supported(vllm.__version__)


# ---------------------------------------------------------------------- the checker, on small trees

VLLM = {
    "_version.py": "__version__ = version = '0.33.0'",
    "pool.py": """
        class Base:
            def __init__(self, size: int):
                self.size = size
                self._free = size

            def free(self, ids, *, now=False): ...

        class Pool(Base):
            limit: int = 0
        """,
    "config.py": """
        from .pool import Pool as Pool

        class Config:
            pool: Pool
        """,
    "util.py": """
        def old_name(a): ...
        """,
}
KVLLM = {
    "engine/ours.py": """
        from vllm.config import Config
        from vllm.pool import Pool

        class OurPool(Pool):
            def free(self, ids, *, now=False):
                self.count = ids
                return super().free(ids, now=now)

        def used(config: Config) -> int:
            pool = config.pool
            pool.limit = 3
            return pool.size - pool._free
        """,
}
REASONS: Any = {"why": "a test", "drop_when": "never"}
OURS: tuple[Touch, ...] = (
    Import(module="vllm.config", names=("Config",), **REASONS),
    Import(module="vllm.pool", names=("Pool",), **REASONS),
    Override(
        ours="kvllm.engine.ours:OurPool", module="vllm.pool", names=("Pool.free(self, ids, *, now=False)",), **REASONS
    ),
    Assignment(module="vllm.pool", names=("Pool.limit",), **REASONS),
    Read(module="vllm.pool", names=("Pool._free",), **REASONS),
)


def write(root: Path, package: str, files: dict[str, str]) -> None:
    for name, text in {"__init__.py": "", **files}.items():
        path = root / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))


def problems(
    tmp_path: Path,
    vllm: dict[str, str] | None = None,
    kvllm: dict[str, str] | None = None,
    seam: tuple[Touch, ...] = OURS,
) -> list[str]:
    """What the checker finds, with some files replaced."""
    write(tmp_path / "theirs", "vllm", VLLM | (vllm or {}))
    write(tmp_path / "ours", "kvllm", KVLLM | (kvllm or {}))
    return Check.of(tmp_path / "theirs", tmp_path / "ours", "kvllm", seam).run()


def test_a_true_declaration_passes(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("class Pool(Base)", "class Tank(Base)", "import vllm.pool:Pool: this vLLM does not have it"),
        ("limit: int", "most: int", "assignment vllm.pool:Pool.limit: this vLLM does not have it"),
        ("self._free = size", "self._rest = size", "read vllm.pool:Pool._free: this vLLM does not have it"),
        ("self.size = size", "self.length = size", "ours.py:13: pool.size: this vLLM's vllm.pool:Pool has no size"),
        ("self.size = size", "self.count = size", "kvllm/engine/ours.py:7: OurPool sets vllm.pool:Pool.count"),
        ("*, now=False", "now=False", "parameters changed from (self, ids, *, now=False) to (self, ids, now=False)"),
        ("*, now=False", "*, now=True", "changed from (self, ids, *, now=False) to (self, ids, *, now=True)"),
        ("free(self, ids,", "free(self, blocks,", "to (self, blocks, *, now=False)"),
        ("ids, *, now=False", "ids", "to (self, ids)"),
        ("def free(self, ids, *, now=False): ...", "free = None", "declared as a function with (self, ids"),
    ],
)
def test_what_changed_in_vllm_is_named(before: str, after: str, message: str, tmp_path: Path) -> None:
    assert before in VLLM["pool.py"]
    found = problems(tmp_path, {"pool.py": VLLM["pool.py"].replace(before, after)})
    assert any(message in problem for problem in found), found


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    moved = {"pool.py": "", "pools.py": VLLM["pool.py"], "config.py": VLLM["config.py"].replace(".pool", ".pools")}
    assert "import vllm.pool:Pool: this vLLM does not have it" in problems(tmp_path, moved)
    (tmp_path / "theirs" / "vllm" / "pool.py").unlink()
    found = Check.of(tmp_path / "theirs", tmp_path / "ours", "kvllm", OURS).run()
    assert "import vllm.pool: this vLLM has no such module" in found


@pytest.mark.parametrize(
    "code, message",
    [
        ("from vllm.util import old_name", "other.py:1: imports vllm.util:old_name, which no Import declares"),
        ("def f():\n    from vllm import util as u\n    u.old_name(1)", "other.py:3: imports vllm.util:old_name"),
        (
            "from vllm.pool import Base\nclass B(Base):\n    def free(self): ...",
            "py:3: B overrides vllm.pool:Base.free",
        ),
        ("def make(base):\n    class B(base): ...", "other.py:2: class B: its base base is not known here"),
        ("def f(pool):\n    return pool._ids", "other.py:2: pool._ids is a private member that the seam"),
        ("def f(pool):\n    pool.size = 1", "other.py:2: sets pool.size, which the seam does not declare"),
        ("from vllm.pool import Pool\ndef f(p: Pool):\n    p.size = 1", "other.py:3: sets p.size, which"),
    ],
)
def test_what_is_not_declared_is_named(code: str, message: str, tmp_path: Path) -> None:
    found = problems(tmp_path, kvllm={"engine/other.py": code})
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    "touch, message",
    [
        (
            Import(module="vllm.util", names=("old_name(a)",), **REASONS),
            "import vllm.util:old_name: stale, nothing imports it",
        ),
        (
            Read(
                module="vllm.pool", names=("Base.free(self, ids, *, now=False)", "Base.__init__(self, size)"), **REASONS
            ),
            "stale",
        ),
        (
            Override(
                ours="kvllm.engine.ours:Gone",
                module="vllm.pool",
                names=("Base.free(self, ids, *, now=False)",),
                **REASONS,
            ),
            "stale, kvllm.engine.ours:Gone does not have it",
        ),
    ],
)
def test_a_stale_declaration_is_named(touch: Touch, message: str, tmp_path: Path) -> None:
    found = problems(tmp_path, seam=(*OURS, touch))
    assert len(found) == 1 and message in found[0], found


def test_an_addition_must_not_be_vllms_own(tmp_path: Path) -> None:
    code = {"engine/other.py": "from vllm.pool import Pool\nPool.kvllm_stats = 1"}
    seam = (*OURS, Addition(module="vllm.pool", names=("Pool.kvllm_stats",), **REASONS))
    assert problems(tmp_path, kvllm=code, seam=seam) == []
    taken = VLLM["pool.py"].replace("limit: int = 0", "limit: int = 0\n            kvllm_stats = None")
    assert "this vLLM has one of its own" in problems(tmp_path, {"pool.py": taken}, code, seam)[0]


def test_releases_differ(tmp_path: Path) -> None:
    """Declarations and branches of another release do not count."""
    code = {
        "engine/compat.py": """
            if RELEASE >= (0, 33):
                from vllm.util import new_name as name
            else:
                from vllm.util import old_name as name
            """
    }
    seam = (
        *OURS,
        Import(module="vllm.util", names=("old_name(a)",), releases=("0.32",), **REASONS),
        Import(module="vllm.util", names=("new_name(a, b)",), releases=("0.33",), **REASONS),
    )
    new = {"util.py": "def new_name(a, b): ..."}
    assert problems(tmp_path, new, code, seam) == []
    assert problems(tmp_path, {"_version.py": "__version__ = '0.32.1'"}, code, seam) == []
    assert "import vllm.util:new_name: this vLLM does not have it" in problems(tmp_path, {}, code, seam)
    # A release to come is expected to have what the newest one has.
    assert problems(tmp_path, new | {"_version.py": "__version__ = '0.34.0'"}, code, seam) == []


def test_functions_to_read_again(tmp_path: Path) -> None:
    write(tmp_path / "old", "vllm", VLLM)
    write(
        tmp_path / "new", "vllm", VLLM | {"pool.py": VLLM["pool.py"].replace("now=False): ...", "now=False): return 1")}
    )
    old, new = (Tree(tmp_path / name, "vllm", (0, 33)) for name in ("old", "new"))
    assert [name.partition(",")[0] for name in changed_bodies(old, new, OURS)] == ["vllm.pool:Pool.free"]
    assert changed_bodies(old, old, OURS) == []


def test_the_command_names_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make check-seam VLLM=FOLDER` on a vLLM that has next to nothing."""
    write(tmp_path, "vllm", VLLM)
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "patch vllm.v1.worker.gpu.model_states: this vLLM has no such module" in out
    assert "patch vllm.engine.arg_utils: this vLLM has no such module" in out
    assert re.search(r"^vLLM 0\.33\.0: \d+ names declared, \d{3} problems\.$", out, re.MULTILINE)


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must contain vllm/"):
        main([str(tmp_path)])
