"""vLLM calls `register` in each of its processes, by the entry point group `vllm.general_plugins`."""

from __future__ import annotations

import functools
from typing import Any

from kvllm.engine.settings import CONFIG_KEY
from kvllm.support import SUPPORTED_VLLM


def register() -> None:
    """Install the seams. Without `additional_config["kvllm"]` none of them changes anything. Can run twice."""
    from vllm.version import __version__ as version

    if version.partition("+")[0] != SUPPORTED_VLLM:
        _refuse_when_configured(version)
        return
    from vllm.v1.engine.core import EngineCore

    from kvllm.engine.patches import apply_patches
    from kvllm.engine.stats import core_stats

    apply_patches()
    # A new utility method, callable from the process that holds the client.
    EngineCore.kvllm_stats = core_stats  # type: ignore[attr-defined]


def _refuse_when_configured(version: str) -> None:
    """On another vLLM touch nothing but the place that would start a KvLLM engine."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, "kvllm_refusal"):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if CONFIG_KEY in (self.additional_config or {}):
            raise ValueError(
                f"vllm=={version}: this KvLLM works with vllm=={SUPPORTED_VLLM}; install that version, or remove "
                f"{CONFIG_KEY!r} from additional_config."
            )
        return original(self, *args, **kwargs)

    create_engine_config.kvllm_refusal = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]
