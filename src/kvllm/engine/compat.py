"""Differences between the supported vLLM releases, hidden from the rest of the code."""

from __future__ import annotations

from vllm.version import __version_tuple__

RELEASE: tuple[int, int] = __version_tuple__[:2]

if RELEASE >= (0, 33):
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache as is_quantized_kv_cache
else:
    from vllm.utils.torch_utils import is_quantized_kv_cache as is_quantized_kv_cache


def set_up_cli() -> None:
    """Prepare the process as vLLM's own command line does, before any engine starts."""
    if RELEASE >= (0, 33):
        from vllm.entrypoints.common.startup import cli_env_setup
    else:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    cli_env_setup()
