"""The seam: every patched symbol is the one we know, and without configuration nothing changes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
import vllm

from kvllm.engine import plugin
from kvllm.engine.patches import PATCHES, Patch, apply_patches
from kvllm.support import SUPPORTED_VLLM


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.target.partition(":")[2])
def test_the_target_has_the_parameters_we_know(patch: Patch) -> None:
    _, _, current = patch.resolve()
    original = inspect.unwrap(current)
    assert tuple(inspect.signature(original).parameters) == patch.parameters
    assert patch.vllm == SUPPORTED_VLLM and patch.why and patch.drop_when


def test_patches_apply_once() -> None:
    apply_patches()
    first = [patch.resolve()[2] for patch in PATCHES]
    apply_patches()
    assert [patch.resolve()[2] for patch in PATCHES] == first
    assert all(vars(patch.resolve()[2])["kvllm_patch"] == patch.target for patch in PATCHES)


def test_import_kvllm_loads_no_vllm() -> None:
    code = "import sys, kvllm, kvllm.config, kvllm.layout; sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_another_vllm_is_refused_by_name_once_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr("vllm.version.__version__", "0.33.1")
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self, *args, **kwargs: "stock")
    plugin.register()
    plain = EngineArgs.__new__(EngineArgs)
    plain.additional_config = {}
    assert plain.create_engine_config() == "stock"
    plain.additional_config = {"kvllm": {}}
    with pytest.raises(ValueError, match=r"vllm==0.33.1.*vllm==" + re.escape(SUPPORTED_VLLM)):
        plain.create_engine_config()


def test_the_installed_vllm_is_the_supported_one() -> None:
    assert vllm.__version__.partition("+")[0] == SUPPORTED_VLLM
