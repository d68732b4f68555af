"""The plugin: vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`)."""

from __future__ import annotations

import functools
from typing import Any

from kvllm.config import CONFIG_KEY
from kvllm.engine.seam import RELEASES
from kvllm.errors import UsageError


def register() -> None:
    """Install the patches, which change nothing without `additional_config["kvllm"]`. Can run twice."""
    from vllm.version import __version__ as version

    if not is_supported(version):
        _refuse_when_configured(version)
        return
    from vllm.v1.engine.core import EngineCore

    from kvllm.engine.seam import apply_patches
    from kvllm.engine.stats import core_stats

    apply_patches()
    # A utility method that the client's process can call.
    EngineCore.kvllm_stats = core_stats  # type: ignore[attr-defined]


def is_supported(version: str) -> bool:
    """Whether `version`, such as 0.33.0+cpu, belongs to a supported release."""
    return ".".join(version.split(".")[:2]) in RELEASES


def _refuse_when_configured(version: str) -> None:
    """On an unsupported vLLM, patch only the function that would start a KvLLM engine."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, "kvllm_refusal"):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if CONFIG_KEY in (self.additional_config or {}):
            raise UsageError(
                f"vllm=={version}: this version of KvLLM supports vLLM {' and '.join(RELEASES)}; install one of these "
                f"releases, or remove {CONFIG_KEY!r} from additional_config."
            )
        return original(self, *args, **kwargs)

    create_engine_config.kvllm_refusal = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]
