"""What KvLLM serves and what it refuses, with the reason: the one place that decides.

Every function returns reasons, each "what=value: why, or the remedy"; an empty list means served. What is not known to
be right is refused. Nothing here imports vLLM: `kvllm plan` and the reference ask before there is an engine, from the
model's config alone. The engine asks again once the model is loaded, when each layer says what it really does.

Compression moves the survivors of a text together, so the index of a token in the cache no longer says where it was in
the text. An attention layer may know positions only from what is in the cache: keys that are rotated, or that come from
hidden states with a position embedding, or from recurrent layers. A layer that computes anything from indices (ALiBi
slopes, relative position bias, windows, chunks) would compute it from the wrong ones. So layers that look back over a
window or a chunk are left to vLLM, as are recurrent ones, and those beside them, of full attention, are compressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvllm.errors import UsageError
from kvllm.groups import Groups
from kvllm.layers import CACHELESS, RECURRENT, Local, Recurrent, layer_kinds, local_layers

CACHE_DTYPES = {
    "cpu": ("auto", "float16", "bfloat16"),
    "cuda": ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3"),
}
# vLLM's own defaults leave little to choose between: a window of 256 tokens must be many blocks.
DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 16}
BACKENDS = {"cpu": ("CPU_ATTN",), "cuda": ("FLASH_ATTN", "TRITON_ATTN")}

PLAIN_BITS = 16  # of survivors that are not rounded
PACKED_BITS = 4  # of those that GPUs pack
FP8_PACKED_BLOCK_SIZE = 32  # an fp8 block holds half the bytes, and its scales take as much: of 16 tokens they take 1/4
ALL_FULL = "all layers must be full attention"
COUNTS_POSITIONS = (
    "it computes the angles of keys from their indices in the text, and M-RoPE's positions behind an image are fewer; "
    "use another method"
)
# Names that configs have for layers of full attention, and for those that look back over a window or a chunk.
FULL_ATTENTION = {"full_attention", "attention"}
LOCAL_ATTENTION = {"sliding_attention", "chunked_attention"}
NO_FULL = "no layer is full attention, so there is nothing to compress"
SERVED_KINDS = "layers must be full, sliding or chunked attention, or recurrent (Mamba, linear attention)"
# The classes of vLLM's attention layers that are served.
ATTENTION = ("vllm.model_executor.layers.attention.attention", "Attention")
MAMBA = ("vllm.model_executor.layers.mamba.abstract", "MambaBase")
MODEL_STATES = {
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState"),
    ("vllm.v1.worker.gpu.model_states.mamba_hybrid", "MambaHybridModelState"),
}
CHUNKED = ("vllm.model_executor.layers.attention.chunked_local_attention", "ChunkedLocalAttention")
# Fields of a config that say how the model tells positions apart: by rotating queries and keys.
ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base")
# Models that add a learned embedding of each position to the hidden states instead.
LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "opt"}
# Models whose configs have no field that says that they use ALiBi.
ALWAYS_ALIBI = {"bloom"}
# Fields that say, where a config has no list of layer kinds, that some layers keep a state instead of a KV cache.
STATE_FIELDS = ("mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim", "linear_attn_config")


def reason(what: str, value: Any, why: str) -> str:
    """One reason, as it stands in messages."""
    return f"{what}={value}: {why}"


def model_reasons(config: Any, max_model_len: int | None = None) -> list[str]:
    """Why the model with this config cannot be compressed.

    config:        a transformers config, of a multimodal model the whole of it
    max_model_len: longest text, prompt included; default: the config's max_position_embeddings
    """
    text = config.get_text_config()
    if max_model_len is None:
        max_model_len = getattr(text, "max_position_embeddings", None)
    found = [
        reason(field, value, why)
        for field, value, why in (
            ("is_encoder_decoder", getattr(config, "is_encoder_decoder", False), "use a decoder-only model"),
            (
                "kv_lora_rank",
                getattr(text, "kv_lora_rank", None),
                "multi-head latent attention keeps no KV heads to choose from",
            ),
            (
                "dual_chunk_attention_config",
                getattr(text, "dual_chunk_attention_config", None),
                "its keys are rotated anew for every chunk of the text",
            ),
            ("rswa_window", getattr(text, "rswa_window", None), ALL_FULL),
            (
                "num_kv_shared_layers",
                getattr(text, "num_kv_shared_layers", None),
                "every layer must have a KV cache of its own",
            ),
            (
                "use_bidirectional_attention",
                getattr(text, "use_bidirectional_attention", None),
                "all layers must be causal attention",
            ),
        )
        if value
    ]
    return found + _layer_kind_reasons(text, max_model_len) + _position_reasons(text)


def check_model(config: Any, name: str, max_model_len: int | None = None) -> None:
    """Raise UsageError, with the first reason, unless the model with this config can be compressed."""
    for found in model_reasons(config, max_model_len):
        raise UsageError(f"KvLLM does not support {name} with {found}.")


def _layer_kind_reasons(text: Any, max_model_len: int | None) -> list[str]:
    if getattr(text, "is_heterogeneous", False):
        differing = ", ".join(sorted(text.per_layer_attributes))
        return [reason("per_layer_config", differing, "these must be the same in all layers")]
    if getattr(text, "layer_types", None) is None and getattr(text, "layers_block_type", None) is None:
        states = [field for field in STATE_FIELDS if getattr(text, field, None)]
        if states:
            return [reason(field, getattr(text, field), SERVED_KINDS) for field in states[:1]]
    if others := set(layer_kinds(text)) - FULL_ATTENTION - LOCAL_ATTENTION - RECURRENT - CACHELESS:
        return [reason("layer_types", ", ".join(sorted(others)), SERVED_KINDS)]
    layers = local_layers(text, max_model_len)
    kinds = {layer for layer in layers if isinstance(layer, Local | Recurrent)}
    if None not in layers:
        if Recurrent() in kinds:
            return [reason("layer_types", ", ".join(sorted(set(layer_kinds(text)))), NO_FULL)]
        return [_all_local(text, next(iter(kinds)), max_model_len)]
    if len(kinds) > 1:
        why = "only one of these may be beside full attention"
        beside = set(layer_kinds(text)) & (LOCAL_ATTENTION | RECURRENT)
        return [reason("layer_types", ", ".join(sorted(beside)), why)]
    if (groups := Groups.of(layers)).num_full > 1:
        others_count = sum(isinstance(layer, Local | Recurrent) for layer in layers)
        counts = f"{layers.count(None)} of full attention, {others_count} others"
        why = f"vLLM would make {groups.num_full} KV cache groups of those of full attention; compression needs one"
        return [reason("layer_types", counts, why)]
    return []


def _all_local(text: Any, local: Local | Recurrent, max_model_len: int | None) -> str:
    longest = "unknown" if max_model_len is None else max_model_len
    if isinstance(local, Recurrent) or local.chunked:
        return reason("attention_chunk_size", getattr(local, "size", None), NO_FULL)
    window = text.sliding_window
    return reason(
        "sliding_window",
        window,
        f"{NO_FULL} if max_model_len={longest}; use --max-model-len {window}, or --hf-overrides "
        "'{\"sliding_window\": null}' if the model allows it",
    )


def _position_reasons(text: Any) -> list[str]:
    attention = getattr(text, "attn_config", None)
    attention = attention if isinstance(attention, Mapping) else getattr(attention, "__dict__", {})
    embedding = str(getattr(text, "position_embedding_type", None) or "").lower()
    alibi = getattr(text, "alibi", False) or getattr(text, "use_alibi", False) or attention.get("alibi")
    if text.model_type in ALWAYS_ALIBI or alibi or "alibi" in embedding:
        return [reason("model_type", text.model_type, "ALiBi takes distances from places in the cache")]
    for field in ("relative_attention_num_buckets", "relative_attention"):
        if getattr(text, field, None):
            return [reason(field, getattr(text, field), "the bias takes distances from places in the cache")]
    if "relative" in embedding:
        return [reason("position_embedding_type", embedding, "the bias takes distances from places in the cache")]
    has_rope = any(getattr(text, field, None) is not None or field in attention for field in ROPE_FIELDS)
    if has_rope or text.model_type in LEARNED_POSITIONS or set(layer_kinds(text)) & RECURRENT:
        return []
    return [
        reason("model_type", text.model_type, "how it tells positions apart is not known; models with RoPE are served")
    ]


def engine_reasons(vllm_config: Any, device: str) -> list[str]:
    """Why an engine with this configuration of vLLM's cannot compress.

    device: "cpu" or "cuda"
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    scheduler_cls = vllm_config.scheduler_config.scheduler_cls
    one_group = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    backend = vllm_config.attention_config.backend
    prefill_parallel = getattr(parallel, "prefill_context_parallel_size", 1)
    before_model: list[tuple[bool, str, Any, str]] = [
        (model.runner_type != "generate", "runner", model.runner_type, "serve a model that generates text"),
    ]
    after_model: list[tuple[bool, str, Any, str]] = [
        (model.use_mla, "model", model.model, "multi-head latent attention keeps no KV heads to choose from"),
        (model.is_encoder_decoder, "model", model.model, "use a decoder-only model"),
        (model.is_attention_free, "model", model.model, NO_FULL),
        (model.is_hybrid and device == "cpu", "device", device, "beside recurrent layers it was checked on GPUs only"),
        (
            model.is_hybrid and cache.mamba_cache_mode == "all",
            "mamba_cache_mode",
            cache.mamba_cache_mode,
            "use align, or none with prefix caching off",
        ),
        (
            model.is_hybrid and cache.prefix_match_unit is not None,
            "prefix_match_unit",
            cache.prefix_match_unit,
            "requests would share parts of blocks; leave it out",
        ),
        *(
            (model.is_hybrid and getattr(cache, name), name, True, "leave it off")
            for name in ("use_kda_recoverssm", "use_replayssm")
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative_config",
            getattr(vllm_config.speculative_config, "method", None),
            "leave speculative decoding off",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "kv_transfer_config",
            getattr(vllm_config.kv_transfer_config, "kv_connector", None),
            "KV connectors would move blocks while they are compressed; leave it off",
        ),
        (
            one_group and any(local_layers(model.hf_config.get_text_config(), model.max_model_len)),
            "disable_hybrid_kv_cache_manager",
            True,
            "layers with a window or a chunk need KV cache groups of their own; leave it out, and "
            "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE at 1",
        ),
        (cache.kv_sharing_fast_prefill, "kv_sharing_fast_prefill", True, "leave it off"),
        (
            bool(cache.kv_cache_dtype_skip_layers),
            "kv_cache_dtype_skip_layers",
            cache.kv_cache_dtype_skip_layers,
            "vLLM would empty new blocks before a step's compressions read them; leave it out",
        ),
        (
            cache.cache_dtype not in CACHE_DTYPES[device],
            "kv_cache_dtype",
            cache.cache_dtype,
            f"use one of {', '.join(CACHE_DTYPES[device])}",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "decode_context_parallel_size",
            parallel.decode_context_parallel_size,
            "use tensor or pipeline parallelism",
        ),
        (
            prefill_parallel > 1,
            "prefill_context_parallel_size",
            prefill_parallel,
            "use tensor or pipeline parallelism",
        ),
        (parallel.enable_dbo, "enable_dbo", True, "leave dual batch overlap off"),
        (
            scheduler_cls is not None,
            "scheduler_cls",
            scheduler_cls,
            "KvLLM brings its own scheduler class; leave it unset",
        ),
        (
            backend is not None and backend.name not in BACKENDS[device],
            "attention_backend",
            getattr(backend, "name", None),
            f"use one of {', '.join(BACKENDS[device])}",
        ),
        (
            device == "cuda" and not vllm_config.use_v2_model_runner,
            "VLLM_USE_V2_MODEL_RUNNER",
            0,
            "on GPUs KvLLM works in the V2 model runner; unset it",
        ),
    ]
    return [
        *(reason(what, value, why) for wrong, what, value, why in before_model if wrong),
        *model_reasons(model.hf_config, model.max_model_len),
        *(reason(what, value, why) for wrong, what, value, why in after_model if wrong),
    ]


def torchvision_problem() -> str | None:
    """Why models that process images cannot be loaded: torchvision is missing, or built for another torch."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return "torchvision is not installed"
    except Exception as e:  # whatever its compiled operators make of another torch
        return f"torchvision does not match torch ({e})"
    return None


def model_state_reasons(cls: type) -> list[str]:
    """Why the V2 runner's state of this model, a class, cannot be extended by compression."""
    if (cls.__module__, cls.__qualname__) in MODEL_STATES:
        return []
    return [reason("model_state", cls.__name__, SERVED_KINDS)]


def is_local_layer(layer: Any, max_model_len: int) -> bool:
    """Whether a layer of vLLM looks back over a window or a chunk. It is left alone, with a KV cache of vLLM's own."""
    if _class_of(layer) == CHUNKED:
        return True
    window = layer.sliding_window if _class_of(layer) == ATTENTION else None
    return window is not None and window < max_model_len


def is_recurrent_layer(layer: Any) -> bool:
    """Whether a layer of vLLM keeps a state of fixed size. It is left alone."""
    return any((cls.__module__, cls.__qualname__) == MAMBA for cls in type(layer).__mro__)


def _class_of(layer: Any) -> tuple[str, str]:
    return type(layer).__module__, type(layer).__qualname__


def layer_reasons(layer: Any, max_model_len: int) -> list[str]:
    """Why a layer of vLLM that keeps a KV cache cannot be served, from what the loaded layer itself says.

    Soft-capped logits are served, since each depends on its own query and key alone, and so are attention sinks, which
    are one more logit. Scaling queries by their position (Llama 4) happens before the layer.
    """
    local = is_local_layer(layer, max_model_len)
    if not local and _class_of(layer) != ATTENTION:
        return [reason("class", ".".join(_class_of(layer)), SERVED_KINDS)]
    impl: Any = getattr(layer, "impl", None)
    checks: Iterable[tuple[bool, str, Any, str]] = (
        (layer.attn_type != "decoder", "attn_type", layer.attn_type, "all layers must be causal attention"),
        (
            not local and getattr(impl, "alibi_slopes", None) is not None,
            "alibi_slopes",
            len(impl.alibi_slopes) if getattr(impl, "alibi_slopes", None) is not None else None,
            "ALiBi takes distances from places in the cache",
        ),
        (
            not local and getattr(impl, "chunk_lookback", -1) > -1,
            "chunk_lookback",
            getattr(impl, "chunk_lookback", -1),
            "a layer that looks back over chunks must have a window",
        ),
        (
            layer.kv_sharing_target_layer_name is not None,
            "kv_sharing_target_layer_name",
            layer.kv_sharing_target_layer_name,
            "every layer must have a KV cache of its own",
        ),
        (not local and layer.use_mm_prefix, "use_mm_prefix", True, "all layers must be causal attention"),
        (
            not local and layer.head_size_v != layer.head_size,
            "head_size_v",
            layer.head_size_v,
            f"keys and values must be equally wide, and keys have {layer.head_size} dimensions",
        ),
    )
    return [reason(what, value, why) for wrong, what, value, why in checks if wrong]


def is_fp8(cache_dtype: str) -> bool:
    """cache_dtype: vLLM's --kv-cache-dtype"""
    return cache_dtype.startswith("fp8")


def default_block_size(device: str, bits: int = PLAIN_BITS, cache_dtype: str = "auto") -> int:
    """Tokens in a block of the KV cache where nobody says otherwise.

    device: "cpu" or "cuda"; bits: of survivors; cache_dtype: vLLM's --kv-cache-dtype
    """
    packed_in_fp8 = device == "cuda" and bits != PLAIN_BITS and is_fp8(cache_dtype)
    return FP8_PACKED_BLOCK_SIZE if packed_in_fp8 else DEFAULT_BLOCK_SIZE[device]


def packed_problem(bits: int, dtype: str, table: Any = None) -> str | None:
    """Why a GPU does not store survivors in so many bits, with the remedy; None where it does, or nothing is rounded.

    dtype: the model's; table: of layer budgets, if there is one
    """
    if bits == PLAIN_BITS:
        return None
    if table:
        return (
            f"survivor_bits={bits}: on GPUs not with the layer budgets of retention_ratio={table}: the two were not "
            "checked together. Use one ratio, or survivor_bits=16."
        )
    if bits != PACKED_BITS:
        return f"survivor_bits={bits}: GPUs pack survivors in {PACKED_BITS} bits. Use {PACKED_BITS}, or 16."
    if dtype not in ("bfloat16", "float16"):
        return (
            f"survivor_bits={bits}: GPUs compute attention over packed survivors in 16 bits, not in dtype={dtype}. Use "
            "--dtype bfloat16, or survivor_bits=16."
        )
    return None


def packed_reasons(layer: Any) -> list[str]:
    """Why attention over packed survivors cannot be merged into that of a layer, from the loaded layer itself.

    Attention sinks are part of the softmax's denominator that FlashAttention 3 hands out; of other versions we do not
    know it.
    """
    backend, impl = layer.attn_backend.get_name(), layer.impl
    version = getattr(impl, "vllm_flash_attn_version", None)
    soft_cap = getattr(impl, "logits_soft_cap", None)
    unknown = f"with FlashAttention {version} we have not checked it, only with 3; use survivor_bits=16"
    checks: Iterable[tuple[bool, str, Any, str]] = (
        (
            backend != "FLASH_ATTN",
            "attention_backend",
            backend,
            "only FLASH_ATTN tells what merging needs; use it, or survivor_bits=16",
        ),
        (bool(soft_cap) and version != 3, "logits_soft_cap", soft_cap, unknown),
        (getattr(impl, "sinks", None) is not None and version != 3, "sinks", "learned", unknown),
        (is_fp8(layer.kv_cache_dtype) and version != 3, "kv_cache_dtype", layer.kv_cache_dtype, unknown),
        (layer.head_size % 16 > 0, "head_size", layer.head_size, "use survivor_bits=16"),
    )
    return [reason(what, value, why) for wrong, what, value, why in checks if wrong]


LAYER_SHAPE = ("num_heads", "num_kv_heads", "head_size", "kv_cache_dtype")


def layers_reasons(layers: Mapping[str, Any]) -> list[str]:
    """Why layers, by their names, that can be compressed one by one cannot be so together."""
    found: list[str] = []
    names = list(layers)
    for attribute in LAYER_SHAPE:
        first = getattr(layers[names[0]], attribute) if names else None
        for name in names:
            if (value := getattr(layers[name], attribute)) != first:
                found.append(reason(attribute, value, f"layer {name} differs from {names[0]}, which has {first}"))
                break
    return found


@contextmanager
def finding_model(name: object) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot find or read into a UsageError."""
    try:
        yield
    except (OSError, ValueError) as e:
        # A folder without a config.json is a ValueError of these words; others are about the model itself.
        if not isinstance(e, OSError) and not str(e).startswith("Unrecognized model"):
            raise
        why = str(e).strip().partition("\n")[0]
        raise UsageError(
            f"{name}: no model found there ({why}); give a model's folder, with its config.json and weights."
        ) from e
