"""The wrappers of KvLLM's patches: each takes a vLLM function and returns its replacement. `seam.py` lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvllm.errors import UsageError


def with_prepared_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kvllm.engine.settings import fewer_seqs, prepare, why_not_inspected

        left_out = self.max_num_seqs is None
        try:
            vllm_config = original(self, *args, **kwargs)
        except ValueError as error:
            if why := why_not_inspected(self, error):
                raise UsageError(why) from error
            raise
        if left_out and (fewer := fewer_seqs(vllm_config)):
            self.max_num_seqs = fewer  # vLLM derives other sizes from it
            vllm_config = original(self, *args, **kwargs)
        prepare(vllm_config)
        return vllm_config

    return create_engine_config


def with_checked_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kvllm.engine.requests import check_engine_request

        request = original(self, *args, **kwargs)
        check_engine_request(self, request)
        return request

    return process_inputs


def with_noted_beam_search(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_watermarking(self: Any, params: Any) -> Any:
        from kvllm.engine.requests import note_beam_search

        note_beam_search(self.vllm_config, params)
        return original(self, params)

    return resolve_watermarking


def with_noted_pool(original: Callable[..., Any]) -> Callable[..., Any]:
    def _apply_ready_response(self: Any, payload: Any) -> None:
        from kvllm.engine.requests import note_pool

        cache_config = self.vllm_config.cache_config
        before = cache_config.num_gpu_blocks or 0
        original(self, payload)
        if added := (cache_config.num_gpu_blocks or 0) - before:
            note_pool(cache_config, added)

    return _apply_ready_response


def with_compressed_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        from kvllm.engine.settings import kv_config

        spec = original(self, vllm_config)
        if (config := kv_config(vllm_config)) is None:
            return spec
        from kvllm.engine.attention import compressed_spec

        return compressed_spec(self.layer_name, spec, config)

    return get_kv_cache_spec


def with_compressing_model_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_model_state_cls(vllm_config: Any, model: Any) -> Any:
        from kvllm.engine.settings import kv_config

        cls = original(vllm_config, model)
        if kv_config(vllm_config) is None:
            return cls
        from kvllm.engine.runner_v2 import compressing

        return compressing(cls)

    return resolve_model_state_cls


def with_adopted_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        from kvllm.engine.settings import kv_config

        original(self, *args, **kwargs)
        self.kv_compressor = None
        if kv_config(self.vllm_config) is not None:
            from kvllm.engine.runner_v1 import compressor_v1

            self.kv_compressor = compressor_v1(self)

    return load_model


def with_released_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        if (compressor := getattr(self, "kv_compressor", None)) is not None:
            compressor.release(scheduler_output)
        return original(self, scheduler_output)

    return _update_states


def with_zeroed_kernel_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    def _zero_block_ids(self: Any, block_ids: Any) -> None:
        if (compressor := getattr(self, "kv_compressor", None)) is not None:
            # vLLM passes ids of allocator blocks, but the caches are indexed by kernel block.
            count = compressor.blocks_per_block
            block_ids = [i * count + part for i in block_ids for part in range(count)]
        original(self, block_ids)

    return _zero_block_ids


def with_compression_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        compressor = getattr(self, "kv_compressor", None)
        if compressor is not None:
            # Only real batches have num_scheduled_tokens; a dummy run compresses nothing.
            scheduled = kwargs.get("num_scheduled_tokens")
            compressor.begin_step(scheduled) if scheduled is not None else compressor.skip_step()
        return original(self, *args, **kwargs)

    return _build_attention_metadata


def with_compression_seconds(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        from kvllm.engine.stats import add_seconds

        output = original(self, grammar_output)
        add_seconds(self, output)
        return output

    return sample_tokens


def with_kv_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(
        self: Any, vllm_config: Any, engine_idxs: Any = None, custom_stat_loggers: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        from kvllm.engine.settings import kv_config

        if kv_config(vllm_config) is not None:
            from kvllm.engine.metrics import KvStatLogger

            custom_stat_loggers = [KvStatLogger, *(custom_stat_loggers or ())]
        original(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    return __init__


def with_watched_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(
        self: Any, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        from kvllm.engine.requests import watch_request

        original(self, request, prompt, parent_req, request_index, queue)
        watch_request(self, request, queue)

    return add_request


def with_noted_front_end(original: Callable[..., Any]) -> Callable[..., Any]:
    def _run_output_handler(self: Any) -> None:
        from kvllm.engine.requests import note_front_end

        note_front_end(self)
        original(self)

    return _run_output_handler


def with_finished_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def _finish_request(self: Any, req_state: Any) -> None:
        original(self, req_state)
        if (watch := getattr(req_state.queue, "kvllm_watch", None)) is not None:
            watch.finish(req_state)

    return _finish_request


def with_kv_usage(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
        from kvllm.engine.settings import kv_config
        from kvllm.engine.usage import asks, check_body, respond

        if kv_config(self.engine_client.vllm_config) is None:
            return await original(self, request, raw_request)
        check_body(request)
        if not asks(request):
            return await original(self, request, raw_request)
        return await respond(lambda: original(self, request, raw_request))

    return create
