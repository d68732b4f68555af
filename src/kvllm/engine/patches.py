"""Every vLLM symbol that KvLLM replaces, each once, with the reason. What vLLM lets us register comes first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Patch:
    """One replaced symbol.

    target:     module:qualified name
    parameters: of the original in vLLM `vllm`, so that an upgrade fails by name
    wrap:       takes the original, returns what replaces it
    """

    target: str
    vllm: str
    parameters: tuple[str, ...]
    wrap: Wrapper
    why: str
    drop_when: str

    def resolve(self) -> tuple[Any, str, Callable[..., Any]]:
        """(owner, attribute, current value) of the target."""
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, import_module(module))
        return owner, name, inspect.getattr_static(owner, name)

    def apply(self) -> None:
        """Replace the target; a second call changes nothing."""
        owner, name, original = self.resolve()
        if getattr(original, "kvllm_patch", None) == self.target:
            return
        replacement = functools.wraps(original)(self.wrap(original))
        replacement.kvllm_patch = self.target  # type: ignore[attr-defined]
        setattr(owner, name, replacement)


def with_prepared_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kvllm.engine.settings import fewer_seqs, prepare, why_not_inspected

        left_out = self.max_num_seqs is None
        try:
            vllm_config = original(self, *args, **kwargs)
        except ValueError as error:
            if why := why_not_inspected(self, error):
                raise ValueError(why) from error
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
        check_engine_request(self.vllm_config, request)
        return request

    return process_inputs


def with_compressed_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        from kvllm.engine.settings import kv_config

        spec = original(self, vllm_config)
        if kv_config(vllm_config) is None:
            return spec
        from kvllm.engine.attention import compressed_spec

        return compressed_spec(self.layer_name, spec)

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
            from kvllm.engine.runner_v1 import CompressorV1

            self.kv_compressor = CompressorV1(self)

    return load_model


def with_compression_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        compressor = getattr(self, "kv_compressor", None)
        if compressor is not None:
            # Only real batches say how many tokens each request has; a dummy run compresses nothing.
            scheduled = kwargs.get("num_scheduled_tokens")
            compressor.begin_step(scheduled) if scheduled is not None else compressor.skip_step()
        return original(self, *args, **kwargs)

    return _build_attention_metadata


PATCHES = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        vllm="0.32.0",
        parameters=("self", "usage_context", "headless"),
        wrap=with_prepared_config,
        why="the first place that has the whole configuration: check it, and choose our scheduler class",
        drop_when="vLLM lets a plugin check and amend a new configuration",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        vllm="0.32.0",
        parameters=(
            "self",
            "request_id",
            "prompt",
            "params",
            "supported_tasks",
            "arrival_time",
            "lora_request",
            "tokenization_kwargs",
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "resumable",
            "session_id",
            "kv_hints",
        ),  # fmt: skip
        wrap=with_checked_request,
        why="a request's own retention ratio is refused with HTTP 400 before it is queued",
        drop_when="vLLM validates extra_args through a plugin for more than logits processors",
    ),
    Patch(
        "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec",
        vllm="0.32.0",
        parameters=("self", "vllm_config"),
        wrap=with_compressed_spec,
        why="a layer asks for our cache spec, so the middle of a request can be freed",
        drop_when="vLLM lets a plugin choose a layer's spec",
    ),
    Patch(
        "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
        vllm="0.32.0",
        parameters=("vllm_config", "model"),
        wrap=with_compressing_model_state,
        why="the V2 runner's per-request state is where windows are compacted and block tables shortened",
        drop_when="vLLM lets a plugin register a ModelState",
    ),
    Patch(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        vllm="0.32.0",
        parameters=("self", "load_dummy_weights"),
        wrap=with_adopted_layers,
        why="the V1 runner has no per-request state to extend: ours is made beside the model",
        drop_when="the CPU platform moves to the V2 runner",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        vllm="0.32.0",
        parameters=(
            "self",
            "num_tokens",
            "num_reqs",
            "max_query_len",
            "num_tokens_padded",
            "num_reqs_padded",
            "ubatch_slices",
            "logits_indices",
            "max_num_sampled_tokens",
            "use_spec_decode",
            "for_cudagraph_capture",
            "num_scheduled_tokens",
            "slot_mappings",
        ),  # fmt: skip
        wrap=with_compression_step,
        why="after the slot mapping is computed and before attention is planned: compact what is due",
        drop_when="the CPU platform moves to the V2 runner",
    ),
)


def apply_patches() -> None:
    """Apply every patch of this file; can run twice."""
    for patch in PATCHES:
        patch.apply()
