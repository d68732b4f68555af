"""The seam: everything we use of vLLM is declared and has the expected form; without our options nothing changes."""

from __future__ import annotations

import ast
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
from kvllm.engine.seam import OBJECTS, PATCHES, RELEASES, SEAM, apply_patches
from kvllm.engine.touch import Addition, Assignment, Import, Override, Patch, Read, Reliance, Touch
from tools.check_seam import ROOT, Check, changed_functions, check_project, installed, main
from tools.syntax_tree import World


def test_the_declarations_match_the_installed_vllm() -> None:
    assert check_project(installed()).problems == []


def test_what_we_use_without_declaring_it_is_checked() -> None:
    """The installed vLLM with a few names changed: what the checker infers of our source is enough to notice."""
    check = Check(installed(), ROOT / "src", SEAM, OBJECTS)
    for name, before, after in (
        ("vllm.model_executor.layers.attention.attention", "self.num_kv_heads =", "self.kv_heads ="),
        ("vllm.v1.worker.gpu_input_batch", "self.num_computed_tokens_cpu =", "self.computed ="),
        ("vllm.v1.metrics.stats", "num_running_reqs:", "num_running:"),
        ("vllm.v1.worker.block_table", "def get_numpy_array(self)", "def get_numpy_array(self, row)"),
        ("vllm.utils.torch_utils", "def async_tensor_h2d(", "def async_tensor_h2d(where, "),
    ):
        module = check.world.module(name)
        assert module is not None
        text = module.path.read_text()
        assert before in text
        module.body = ast.parse(text.replace(before, after))
    found = "\n".join(check.run())
    assert "layer.num_kv_heads: this vLLM's vllm.model_executor.layers.attention.attention:Attention has no" in found
    assert "batch.num_computed_tokens_cpu: this vLLM's vllm.v1.worker.gpu_input_batch:InputBatch has no" in found
    assert "scheduler_stats.num_running_reqs: this vLLM's vllm.v1.metrics.stats:SchedulerStats has no" in found
    assert "get_numpy_array(...) does not fit this vLLM's" in found
    assert "async_tensor_h2d(...) does not fit this vLLM's" in found


def test_every_declaration_says_why() -> None:
    for touch in SEAM:
        assert touch.why and touch.drop_when and touch.paths and set(touch.releases) <= set(RELEASES), touch
        assert all(re.fullmatch(r"\w[\w.]*", path) for path in touch.paths), touch


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

            def grow(self, by, at=0, *, force, why=None): ...
        """,
    "config.py": """
        from .pool import Pool as Pool

        class Config:
            pool: Pool
        """,
    "util.py": """
        def old_name(a): ...
        def _private(a): ...
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
    Override("vllm.pool:Pool", "free(self, ids, *, now=False)", ours="kvllm.engine.ours:OurPool", **REASONS),
    Assignment("vllm.pool:Pool", "limit", **REASONS),
    Read("vllm.pool:Pool", "_free", **REASONS),
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
    objects: dict[str, dict[str, str]] | None = None,
) -> list[str]:
    """What the checker finds, with some files replaced."""
    write(tmp_path / "theirs", "vllm", VLLM | (vllm or {}))
    write(tmp_path / "ours", "kvllm", KVLLM | (kvllm or {}))
    return Check(tmp_path / "theirs", tmp_path / "ours", seam, objects).run()


def test_a_true_declaration_passes(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("class Pool(Base)", "class Tank(Base)", "ours.py:3: imports vllm.pool:Pool, which this vLLM does not have"),
        ("limit: int", "most: int", "assignment vllm.pool:Pool.limit: this vLLM does not have it"),
        ("self._free = size", "self._rest = size", "read vllm.pool:Pool._free: this vLLM does not have it"),
        ("self.size = size", "self.length = size", "ours.py:13: pool.size: this vLLM's vllm.pool:Pool has no size"),
        ("self.size = size", "self.count = size", "ours.py:7: OurPool sets vllm.pool:Pool.count, which the seam"),
        ("*, now=False", "now=False", "parameters changed from (self, ids, *, now=False) to (self, ids, now=False)"),
        ("*, now=False", "*, now=True", "changed from (self, ids, *, now=False) to (self, ids, *, now=True)"),
        ("free(self, ids,", "free(self, blocks,", "to (self, blocks, *, now=False)"),
        ("ids, *, now=False", "ids", "to (self, ids)"),
        (
            "ids, *, now=False",
            "ids",
            "ours.py:8: super().free(...) does not fit this vLLM's vllm.pool:free(self, ids): got an unexpected",
        ),
        ("def free(self, ids, *, now=False): ...", "free = None", "declared as a function with (self, ids"),
    ],
)
def test_what_changed_in_vllm_is_named(before: str, after: str, message: str, tmp_path: Path) -> None:
    assert before in VLLM["pool.py"]
    found = problems(tmp_path, {"pool.py": VLLM["pool.py"].replace(before, after)})
    assert any(message in problem for problem in found), found


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    moved = {"pool.py": "", "pools.py": VLLM["pool.py"], "config.py": VLLM["config.py"].replace(".pool", ".pools")}
    assert "ours.py:3: imports vllm.pool:Pool, which this vLLM does not have" in problems(tmp_path, moved)
    (tmp_path / "theirs" / "vllm" / "pool.py").unlink()
    found = Check(tmp_path / "theirs", tmp_path / "ours", OURS).run()
    assert "read vllm.pool:Pool._free: this vLLM has no module vllm.pool" in found
    assert "ours.py:3: imports vllm.pool:Pool, which this vLLM does not have" in found


@pytest.mark.parametrize(
    "code, message",
    [
        ("from vllm.util import gone", "other.py:1: imports vllm.util:gone, which this vLLM does not have"),
        ("import vllm.gone", "other.py:1: imports vllm.gone, which this vLLM does not have"),
        ("def f():\n    from vllm import util as u\n    u.gone(1)", "other.py:3: imports vllm.util:gone"),
        ("from vllm.util import _private", "other.py:1: imports vllm.util:_private, which is private, and no Import"),
        ("from vllm import util\nutil._private(1)", "other.py:2: imports vllm.util:_private, which is private"),
        ("NAME = 'vllm.gone.Class'", "other.py:1: names vllm.gone.Class, which this vLLM does not have"),
        ("NAME = 'vllm.pool', 'Gone'", "other.py:1: names vllm.pool:Gone, which this vLLM does not have"),
        ("def f(pool):\n    setattr(pool, '_ids', 1)", "other.py:2: names _ids, a private member that the seam"),
        (
            "from vllm.pool import Base\nclass B(Base):\n    def free(self): ...",
            "py:3: B overrides vllm.pool:Base.free",
        ),
        ("def make(base):\n    class B(base): ...", "other.py:2: class B: its base base is not known"),
        ("def f(pool):\n    return pool._ids", "other.py:2: pool._ids is a private member that the seam"),
        ("def f(pool):\n    pool.size = 1", "other.py:2: sets pool.size, which the seam does not declare"),
        ("from vllm.pool import Pool\ndef f(p: Pool):\n    p.size = 1", "other.py:3: sets p.size, which"),
        (
            "from vllm.pool import Pool\ndef f(x):\n    if isinstance(x, Pool):\n        return x.sise",
            "other.py:4: x.sise: this vLLM's vllm.pool:Pool has no sise",
        ),
        (
            "from dataclasses import replace\nfrom vllm.pool import Pool\ndef f(p: Pool):\n    replace(p, sise=1)",
            "other.py:4: p.sise: this vLLM's vllm.pool:Pool has no sise",
        ),
    ],
)
def test_what_is_not_declared_is_named(code: str, message: str, tmp_path: Path) -> None:
    found = problems(tmp_path, kvllm={"engine/other.py": code})
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    "call, problem",
    [
        ("p.grow(1, force=True)", None),
        ("p.grow(1, 2, force=True, why='')", None),
        ("p.grow(*args, **options)", None),
        (
            "p.grow(1)",
            "p.grow(...) does not fit this vLLM's vllm.pool:grow(self, by, at=0, *, force, why=None): missing a",
        ),
        ("p.grow(force=1)", "missing a required argument: 'by'"),
        ("p.grow(1, 2, 3, force=True)", "too many positional arguments"),
        ("p.grow(1, force=True, how=1)", "got an unexpected keyword argument 'how'"),
        ("Pool()", "missing a required argument: 'size'"),
        ("old_name(1, 2)", "too many positional arguments"),
    ],
)
def test_calls_must_fit_the_functions_of_vllm(call: str, problem: str | None, tmp_path: Path) -> None:
    code = f"""
        from vllm.pool import Pool
        from vllm.util import old_name

        def f(p: Pool, args, options):
            {call}
        """
    found = problems(tmp_path, kvllm={"engine/other.py": code})
    assert found == [] if problem is None else len(found) == 1 and problem in found[0], found


def test_members_of_objects_without_annotations_are_checked(tmp_path: Path) -> None:
    code = {"engine/other.py": "from typing import Any\ndef f(pool: Any):\n    return pool.size, pool.sise"}
    assert problems(tmp_path, kvllm=code) == []
    objects = {"kvllm.engine.other": {"pool": "vllm.pool:Pool"}}
    assert problems(tmp_path, kvllm=code, objects=objects) == [
        "other.py:3: pool.sise: this vLLM's vllm.pool:Pool has no sise"
    ]
    objects = {"kvllm.engine.other": {"pool": "vllm.pool:Gone", "tank": "vllm.pool:Pool"}}
    gone, stale = problems(tmp_path, kvllm=code, objects=objects)
    assert gone == "OBJECTS kvllm.engine.other pool: this vLLM has no vllm.pool:Gone"
    assert stale == "OBJECTS kvllm.engine.other tank: stale, no member of it is used"
    objects = {"kvllm.engine.gone": {"pool": "vllm.pool:Pool"}}
    assert problems(tmp_path, kvllm=code, objects=objects) == [
        "OBJECTS kvllm.engine.gone: stale, there is no such module"
    ]


@pytest.mark.parametrize(
    "touch, message",
    [
        (Import("vllm.util", "_private", **REASONS), "import vllm.util:_private: stale, nothing imports it"),
        (Read("vllm.pool:Base", "__init__", **REASONS), "read vllm.pool:Base.__init__: stale, nothing uses it"),
        (
            Override("vllm.pool:Base", "free(self, ids, *, now=False)", ours="kvllm.engine.ours:Gone", **REASONS),
            "stale, kvllm.engine.ours:Gone does not have it",
        ),
    ],
)
def test_a_stale_declaration_is_named(touch: Touch, message: str, tmp_path: Path) -> None:
    found = problems(tmp_path, seam=(*OURS, touch))
    assert len(found) == 1 and message in found[0], found


def test_an_addition_must_not_be_vllms_own(tmp_path: Path) -> None:
    code = {"engine/other.py": "from vllm.pool import Pool\nPool.kvllm_stats = 1"}
    seam = (*OURS, Addition("vllm.pool:Pool", "kvllm_stats", **REASONS))
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
        Reliance("vllm.util", "old_name(a)", releases=("0.32",), **REASONS),
        Reliance("vllm.util", "new_name(a, b)", releases=("0.33",), **REASONS),
    )
    new = {"util.py": "def new_name(a, b): ..."}
    assert problems(tmp_path, new, code, seam) == []
    assert problems(tmp_path, {"_version.py": "__version__ = '0.32.1'"}, code, seam) == []
    found = problems(tmp_path, {}, code, seam)
    assert "reliance vllm.util:new_name: this vLLM does not have it" in found
    assert "compat.py:3: imports vllm.util:new_name, which this vLLM does not have" in found
    # A release to come is expected to have what the newest one has.
    assert problems(tmp_path, new | {"_version.py": "__version__ = '0.34.0'"}, code, seam) == []


def test_changed_functions_are_listed(tmp_path: Path) -> None:
    """They are the changed functions among those that are declared or called."""
    write(tmp_path / "old", "vllm", VLLM)
    changed = {
        "pool.py": VLLM["pool.py"].replace("now=False): ...", "now=False): return 1"),
        "util.py": VLLM["util.py"].replace("(a): ...", "(a): return 1"),
    }
    write(tmp_path / "new", "vllm", VLLM | changed)
    code = "from vllm.util import old_name\nold_name(1)"
    write(tmp_path / "ours", "kvllm", KVLLM | {"engine/other.py": code})
    check = Check(tmp_path / "new", tmp_path / "ours", OURS)
    assert check.run() == []
    found = changed_functions(World({"vllm": tmp_path / "old"}, (0, 33)), check)
    assert [name.partition(",")[0] for name in found] == ["vllm.pool:Pool.free", "vllm.util:old_name"]
    assert changed_functions(World({"vllm": tmp_path / "new"}, (0, 33)), check) == []


def test_the_command_names_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make check-seam VLLM=FOLDER` on a vLLM that lacks nearly everything."""
    write(tmp_path, "vllm", VLLM)
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "patch vllm.v1.worker.gpu.model_states:resolve_model_state_cls: this vLLM has no module" in out
    assert re.search(
        r"src/kvllm/engine/plugin.py:\d+: imports vllm.v1.engine.core:EngineCore, which this vLLM does not", out
    )
    assert re.search(r"^vLLM 0\.33\.0: \d+ names declared, \d{3} problems\.$", out, re.MULTILINE)


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must contain vllm/"):
        main([str(tmp_path)])
