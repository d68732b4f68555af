"""Checking requests where they arrive, so that a wrong one is refused and none is served wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.utils import length_from_prompt_token_ids_or_embeds

from kvllm.engine.settings import RATIO_KEY, Geometries, check_request, kv_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def check_engine_request(vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Raise VLLMValidationError (HTTP 400) for a request that compression cannot serve."""
    config = kv_config(vllm_config)
    params = request.sampling_params
    if config is None or params is None:
        return
    geometries = Geometries(config, vllm_config.cache_config.block_size)
    num_prompt_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    max_model_len = vllm_config.model_config.max_model_len
    max_tokens = min(params.max_tokens or max_model_len, max_model_len - num_prompt_tokens)
    try:
        check_request(geometries, params, num_prompt_tokens, max_tokens, _num_blocks(vllm_config))
    except ValueError as e:
        raise VLLMValidationError(str(e), parameter=RATIO_KEY) from e
    if request.resumable and geometries.of(params) is not None:
        raise VLLMValidationError(
            f"streaming input sessions cannot be compressed; send the request with {RATIO_KEY}=1.0",
            parameter=RATIO_KEY,
        )


def _num_blocks(vllm_config: VllmConfig) -> int:
    """Blocks of one engine's pool, less the null block; 0 where this process does not know them."""
    total = vllm_config.cache_config.num_gpu_blocks or 0
    # The client adds up the pools of its data-parallel engines.
    return max(total // vllm_config.parallel_config.data_parallel_size - 1, 0)
