"""Which models, layers and vLLM options are supported, and why others are refused; no other module decides this.

Every function returns reasons, each "what=value: why, or the remedy"; an empty list means supported. What is not known
to work is refused. Nothing here imports vLLM: `kvllm plan` and the reference check the model's config before an engine
exists. The engine checks again once the model is loaded, from what each layer really is.

Compression moves survivors together, so a token's index in the cache no longer tells its position in the text. A
compressed layer may get positions only from the cached keys: they are rotated, or computed from hidden states with
position embeddings or from recurrent layers. A layer that computes anything from indices (ALiBi slopes, relative
position bias, windows, chunks) would use the wrong ones. So layers with a window or a chunk are left to vLLM, as are
recurrent ones, and the full-attention layers beside them are compressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvllm.errors import UsageError, message_of
from kvllm.groups import Groups, block_scales
from kvllm.layers import (
    CACHELESS,
    RECURRENT,
    LayerKind,
    Local,
    Recurrent,
    has_other_heads,
    heads_of,
    layer_kinds,
    local_layers,
)

CACHE_DTYPES = {
    "cpu": ("auto", "float16", "bfloat16"),
    "cuda": ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3"),
}
# A window of 256 tokens must be many blocks, since it keeps whole ones; vLLM's own defaults can be too large for that.
DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 16}
BACKENDS = {"cpu": ("CPU_ATTN",), "cuda": ("FLASH_ATTN", "TRITON_ATTN")}

OFFLOADING = "OffloadingConnector"  # the one KV connector of vLLM's that is served
OFFLOADING_OPTIONS = {
    "cpu_bytes_to_use", "blocks_per_chunk", "block_size", "eviction_policy", "offload_prompt_only", "store_threshold",
    "max_tracker_size",
}  # fmt: skip
PLAIN_BITS = 16  # of survivors that are not rounded
PACKED_BITS = 4  # of survivors that GPUs pack
MM_PREFIX = (
    "tokens of an image attend to later ones, and all layers must use causal attention; use --language-model-only for "
    "text alone"
)
MM_PREFIX_MODELS = {"bagel", "gemma3", "molmo2", "moondream3", "paligemma"}  # vLLM's list; others say so in the config
CHECKED_DIMS = 256  # of the largest heads for which packed survivors and fp8 caches were checked
UNCHECKED_FP8 = f"not checked with heads of more than {CHECKED_DIMS} dimensions; leave it at auto"
FP8_PACKED_BLOCK_SIZE = 32  # an fp8 block has half the bytes and scales as large: of 16 tokens it packs 24, of 32 56
ALL_FULL = "all layers must use full attention"
SHARED_CACHE = (
    "layers that share a KV cache are not supported, since the queries of only one of them would choose what is kept; "
    "serve the model without KvLLM"
)
ALIBI = "ALiBi computes distances from indices in the cache, which compression changes"
RELATIVE_BIAS = "the bias depends on indices in the cache, which compression changes"
COUNTS_POSITIONS = (
    "it computes the keys' angles from their indices in the text, which M-RoPE's positions no longer equal after an "
    "image; use another method"
)
# Names in configs for full-attention layers, and for layers that attend within a window or a chunk.
FULL_ATTENTION = {"full_attention", "attention"}
LOCAL_ATTENTION = {"sliding_attention", "chunked_attention"}
PER_LAYER_HEADS = {"head_dim", "num_key_value_heads"}
NO_FULL = "no layer has full attention, so there is nothing to compress"
SERVED_KINDS = "supported layers are full, sliding-window and chunked attention, Mamba and linear attention"
# The supported classes of vLLM's layers, and of the V2 runner's model state.
ATTENTION = ("vllm.model_executor.layers.attention.attention", "Attention")
MAMBA = ("vllm.model_executor.layers.mamba.abstract", "MambaBase")
MODEL_STATES = {
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState"),
    ("vllm.v1.worker.gpu.model_states.mamba_hybrid", "MambaHybridModelState"),
}
CHUNKED = ("vllm.model_executor.layers.attention.chunked_local_attention", "ChunkedLocalAttention")
# Fields of a config that show that the model uses RoPE.
ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base")
# Models with learned position embeddings instead.
LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "opt"}
# Models that use ALiBi without a field in their configs that says so.
ALWAYS_ALIBI = {"bloom"}
# Fields that reveal recurrent layers in a config without a list of layer kinds.
STATE_FIELDS = ("mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim", "linear_attn_config")


def reason(what: str, value: Any, why: str) -> str:
    """One reason, as messages show it."""
    return f"{what}={value}: {why}"


def model_reasons(
    config: Any, max_model_len: int | None = None, sees_images: bool = True, num_shards: int = 1
) -> list[str]:
    """Why the model with this config cannot be compressed.

    config:        a transformers config, not only the text config of a multimodal model
    max_model_len: maximum text length, prompt included; default: the config's max_position_embeddings
    sees_images:   whether prompts may have images; False with vLLM's --language-model-only
    num_shards:    devices over which the heads are sharded (tensor parallelism)
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
                "multi-head latent attention is not supported",
            ),
            (
                "dual_chunk_attention_config",
                getattr(text, "dual_chunk_attention_config", None),
                "dual chunk attention rotates keys again for every chunk of the text",
            ),
            ("rswa_window", getattr(text, "rswa_window", None), ALL_FULL),
            (
                "num_kv_shared_layers",
                getattr(text, "num_kv_shared_layers", None),
                SHARED_CACHE,
            ),
            (
                "use_bidirectional_attention",
                _bidirectional(text),
                "all layers must use causal attention",
            ),
            ("use_mm_prefix", sees_images and has_mm_prefix(config), MM_PREFIX),
        )
        if value
    ]
    found += [*_value_size_reasons(text), *_layer_kind_reasons(text, max_model_len, num_shards)]
    return found + _position_reasons(text)


def check_model(config: Any, name: str, max_model_len: int | None = None, sees_images: bool = True) -> None:
    """Raise UsageError, with the first of `model_reasons`, unless the model with this config can be compressed."""
    for found in model_reasons(config, max_model_len, sees_images):
        raise UsageError(f"KvLLM does not support {name} with {found}.")


def _bidirectional(text: Any) -> Any:
    """What attends to later tokens; None if at most the tokens of an image do (`has_mm_prefix`)."""
    value = getattr(text, "use_bidirectional_attention", None)
    return None if value == "vision" else value


def has_mm_prefix(config: Any) -> bool:
    """Whether tokens of an image attend to later ones, as vLLM decides (`ModelConfig.is_mm_prefix_lm`).

    config: a transformers config; that of a language model alone takes no images
    """
    text = config.get_text_config()
    if text is config and config.model_type not in MM_PREFIX_MODELS:
        return False
    if hasattr(config, "is_mm_prefix_lm"):
        return bool(config.is_mm_prefix_lm)
    return config.model_type in MM_PREFIX_MODELS or getattr(text, "use_bidirectional_attention", None) == "vision"


def has_mrope(config: Any) -> bool:
    """Whether an image has fewer positions than tokens: M-RoPE. config: a transformers config"""
    fields = (getattr(config.get_text_config(), name, None) for name in ("rope_parameters", "rope_scaling"))
    return any("mrope_section" in field for field in fields if isinstance(field, Mapping))


def _value_size_reasons(text: Any) -> list[str]:
    """Of latent attention, whose cache has neither keys nor values, `model_reasons` says something else."""
    size = getattr(text, "v_head_dim", None)
    own = None if has_other_heads(text) else getattr(text, "head_dim", None)
    if getattr(text, "kv_lora_rank", None) or None in (size, own) or size == own:
        return []
    return [reason("head_size_v", size, f"keys and values must have the same head size, and that of the keys is {own}")]


def _heads_reasons(text: Any, layers: list[LayerKind], num_shards: int) -> list[str]:
    """Why layers with different heads are not supported together; layers: their kinds."""
    if not has_other_heads(text):
        return []
    attributes = set(text.per_layer_attributes)
    differing = ", ".join(sorted(attributes))
    if attributes - PER_LAYER_HEADS:
        return [reason("per_layer_config", differing, "these must be the same in all layers")]
    full, local = (
        list({heads_of(text, i) for i, kind in enumerate(layers) if isinstance(kind, wanted)})
        for wanted in (type(None), Local)
    )
    if len(full) > 1:
        return [
            reason(
                "per_layer_config",
                differing,
                "these must be the same in all full-attention layers, and a window of at least max_model_len is full "
                "attention; use a --max-model-len longer than the window, or serve the model without KvLLM",
            )
        ]
    if len(local) > 1:
        return [reason("per_layer_config", differing, "these must be the same in all layers with a window")]
    try:
        if full and local:
            block_scales(full[0], local[0], num_shards)
    except UsageError as e:
        return [str(e).removesuffix(".")]
    return []


def _layer_kind_reasons(text: Any, max_model_len: int | None, num_shards: int) -> list[str]:
    if getattr(text, "layer_types", None) is None and getattr(text, "layers_block_type", None) is None:
        states = [field for field in STATE_FIELDS if getattr(text, field, None)]
        if states:
            return [reason(field, getattr(text, field), SERVED_KINDS) for field in states[:1]]
    if others := set(layer_kinds(text)) - FULL_ATTENTION - LOCAL_ATTENTION - RECURRENT - CACHELESS:
        return [reason("layer_types", ", ".join(sorted(others)), SERVED_KINDS)]
    layers = local_layers(text, max_model_len)
    if found := _heads_reasons(text, layers, num_shards):
        return found
    kinds = {layer for layer in layers if isinstance(layer, Local | Recurrent)}
    if None not in layers:
        if Recurrent() in kinds:
            return [reason("layer_types", ", ".join(sorted(set(layer_kinds(text)))), NO_FULL)]
        return [_all_local(text, next(iter(kinds)), max_model_len)]
    if len(kinds) > 1:
        why = "only one of these kinds may be combined with full attention"
        beside = set(layer_kinds(text)) & (LOCAL_ATTENTION | RECURRENT)
        return [reason("layer_types", ", ".join(sorted(beside)), why)]
    if (groups := Groups.of(layers)).num_full > 1:
        others_count = sum(isinstance(layer, Local | Recurrent) for layer in layers)
        counts = f"{layers.count(None)} full attention, {others_count} other"
        why = f"vLLM would split the full-attention layers into {groups.num_full} KV cache groups; they must form one"
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
        f"{NO_FULL} with max_model_len={longest}; use --max-model-len {window}, or --hf-overrides "
        "'{\"sliding_window\": null}' if the model allows it",
    )


def _position_reasons(text: Any) -> list[str]:
    attention = getattr(text, "attn_config", None)
    attention = attention if isinstance(attention, Mapping) else getattr(attention, "__dict__", {})
    embedding = str(getattr(text, "position_embedding_type", None) or "").lower()
    alibi = getattr(text, "alibi", False) or getattr(text, "use_alibi", False) or attention.get("alibi")
    if text.model_type in ALWAYS_ALIBI or alibi or "alibi" in embedding:
        return [reason("model_type", text.model_type, ALIBI)]
    for field in ("relative_attention_num_buckets", "relative_attention"):
        if getattr(text, field, None):
            return [reason(field, getattr(text, field), RELATIVE_BIAS)]
    if "relative" in embedding:
        return [reason("position_embedding_type", embedding, RELATIVE_BIAS)]
    has_rope = any(getattr(text, field, None) is not None or field in attention for field in ROPE_FIELDS)
    if has_rope or text.model_type in LEARNED_POSITIONS or set(layer_kinds(text)) & RECURRENT:
        return []
    return [reason("model_type", text.model_type, "its position encoding is not known; models with RoPE are supported")]


def engine_reasons(vllm_config: Any, device: str) -> list[str]:
    """Why an engine with this vLLM configuration cannot compress.

    device: "cpu" or "cuda"
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    scheduler_cls = vllm_config.scheduler_config.scheduler_cls
    one_group = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    backend = vllm_config.attention_config.backend
    # vLLM asks for this one in models whose layers have different heads, also on CPUs, which then use their own.
    asked = device == "cpu" and backend is not None and backend.name == "TRITON_ATTN"
    set_by_vllm = asked and has_other_heads(model.hf_config.get_text_config())
    prefill_parallel = getattr(parallel, "prefill_context_parallel_size", 1)
    transfer = vllm_config.kv_transfer_config
    before_model: list[tuple[bool, str, Any, str]] = [
        (model.runner_type != "generate", "runner", model.runner_type, "serve a model that generates text"),
    ]
    after_model: list[tuple[bool, str, Any, str]] = [
        (model.use_mla, "model", model.model, "multi-head latent attention is not supported"),
        (model.is_encoder_decoder, "model", model.model, "use a decoder-only model"),
        (model.is_attention_free, "model", model.model, NO_FULL),
        (
            model.multimodal_config is not None and model.is_mm_prefix_lm,
            "use_mm_prefix",
            True,
            MM_PREFIX,
        ),
        (model.is_hybrid and device == "cpu", "device", device, "recurrent layers are supported on GPUs only"),
        (
            model.is_hybrid and cache.mamba_cache_mode == "all",
            "mamba_cache_mode",
            cache.mamba_cache_mode,
            "use align, or none without prefix caching",
        ),
        (
            model.is_hybrid and cache.prefix_match_unit is not None,
            "prefix_match_unit",
            cache.prefix_match_unit,
            "requests would share parts of blocks; leave it unset",
        ),
        *(
            (model.is_hybrid and getattr(cache, name), name, True, "leave it off")
            for name in ("use_kda_recoverssm", "use_replayssm")
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative_config",
            getattr(vllm_config.speculative_config, "method", None),
            "speculative decoding is not supported; leave it off",
        ),
        (
            transfer is not None and transfer.kv_connector != OFFLOADING,
            "kv_connector",
            getattr(transfer, "kv_connector", None),
            "it may take blocks of generated tokens for what their hashes say, and compression rewrites them; leave it "
            "off, or offload prompts with --kv-offloading-size",
        ),
        (
            one_group and any(local_layers(model.hf_config.get_text_config(), model.max_model_len)),
            "disable_hybrid_kv_cache_manager",
            True,
            "sliding-window and chunked layers need KV cache groups of their own; leave it unset, and "
            "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE at 1",
        ),
        (cache.kv_sharing_fast_prefill, "kv_sharing_fast_prefill", True, "leave it off"),
        (
            bool(cache.kv_cache_dtype_skip_layers),
            "kv_cache_dtype_skip_layers",
            cache.kv_cache_dtype_skip_layers,
            "vLLM would zero new blocks before a step's compressions read them; leave it unset",
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
        (parallel.enable_dbo, "enable_dbo", True, "dual batch overlap is not supported; leave it off"),
        (
            scheduler_cls is not None,
            "scheduler_cls",
            scheduler_cls,
            "KvLLM brings its own scheduler class; leave it unset",
        ),
        (
            backend is not None and backend.name not in BACKENDS[device] and not set_by_vllm,
            "attention_backend",
            getattr(backend, "name", None),
            f"use one of {', '.join(BACKENDS[device])}",
        ),
        (
            device == "cuda" and not vllm_config.use_v2_model_runner,
            "VLLM_USE_V2_MODEL_RUNNER",
            0,
            "on GPUs KvLLM needs the V2 model runner; unset it",
        ),
    ]
    return [
        *(reason(what, value, why) for wrong, what, value, why in before_model if wrong),
        *model_reasons(model.hf_config, model.max_model_len, False, parallel.tensor_parallel_size),  # images: above
        *(reason(what, value, why) for wrong, what, value, why in after_model if wrong),
    ]


def offloading_reasons(vllm_config: Any, device: str, prompt_budget: int, num_parts: int) -> list[str]:
    """Why an engine cannot copy prompts to host memory (--kv-offloading-size) and compress as well.

    device: "cpu" or "cuda"; prompt_budget, num_parts: of the `KvConfig`, the latter the number of its parts
    """
    transfer, parallel, cache = vllm_config.kv_transfer_config, vllm_config.parallel_config, vllm_config.cache_config
    if transfer is None:
        return []
    unknown = sorted(set(transfer.kv_connector_extra_config) - OFFLOADING_OPTIONS)
    text, max_model_len = vllm_config.model_config.hf_config.get_text_config(), vllm_config.model_config.max_model_len
    checks: list[tuple[bool, str, Any, str]] = [
        (device == "cpu", "kv_offloading_size", cache.kv_offloading_size, "vLLM offloads from GPUs only; leave it off"),
        (
            bool(transfer.kv_connector_module_path),
            "kv_connector_module_path",
            transfer.kv_connector_module_path,
            "only vLLM's own OffloadingConnector was checked; leave it out",
        ),
        (transfer.kv_role != "kv_both", "kv_role", transfer.kv_role, "offloading stores and loads; use kv_both"),
        (
            bool(unknown),
            "kv_connector_extra_config",
            ", ".join(unknown),
            f"not checked with compression; use no others than {', '.join(sorted(OFFLOADING_OPTIONS))}",
        ),
        (
            not cache.enable_prefix_caching,
            "enable_prefix_caching",
            False,
            "offloading was checked as an extension of the prefix cache; leave it on, or --kv-offloading-size out",
        ),
        (
            prompt_budget > 0,
            "prompt_budget",
            prompt_budget,
            "prompts that are cut could be stored after the cut; use 0 with --kv-offloading-size",
        ),
        (
            num_parts > 1 or any(local_layers(text, max_model_len)),
            "kv_offloading_size",
            cache.kv_offloading_size,
            "with several KV cache groups (layer budgets, or layers other than full attention) it was not checked; "
            "leave it off",
        ),
        (
            parallel.world_size > 1,
            "world_size",
            parallel.world_size,
            "offloading was checked with one GPU an engine; use one, or leave --kv-offloading-size out",
        ),
        (
            parallel.data_parallel_size > 1,
            "data_parallel_size",
            parallel.data_parallel_size,
            "offloading was checked with one engine; use 1, or leave --kv-offloading-size out",
        ),
    ]
    return [reason(what, value, why) for wrong, what, value, why in checks if wrong]


def torchvision_problem() -> str | None:
    """Why models that process images cannot be loaded: torchvision is missing, or built for another torch."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return "torchvision is not installed"
    except Exception as e:  # its compiled operators may fail in any way with another torch
        return f"torchvision does not match torch ({e})"
    return None


def model_state_reasons(cls: type) -> list[str]:
    """Why compression cannot extend this class of the V2 runner's model state."""
    if (cls.__module__, cls.__qualname__) in MODEL_STATES:
        return []
    return [reason("model_state", cls.__name__, SERVED_KINDS)]


def is_local_layer(layer: Any, max_model_len: int) -> bool:
    """Whether a vLLM layer attends within a window or a chunk. Such a layer keeps vLLM's own KV cache."""
    if _class_of(layer) == CHUNKED:
        return True
    window = layer.sliding_window if _class_of(layer) == ATTENTION else None
    return window is not None and window < max_model_len


def is_recurrent_layer(layer: Any) -> bool:
    """Whether a vLLM layer keeps a state of fixed size. Such a layer is left to vLLM."""
    return any((cls.__module__, cls.__qualname__) == MAMBA for cls in type(layer).__mro__)


def _class_of(layer: Any) -> tuple[str, str]:
    return type(layer).__module__, type(layer).__qualname__


def layer_reasons(layer: Any, max_model_len: int, sees_images: bool = True) -> list[str]:
    """Why a vLLM layer with a KV cache is not supported, judged from the loaded layer itself.

    sees_images: whether prompts may have images

    Soft-capped logits are supported, since each depends on its own query and key alone, and so are attention sinks,
    which add one logit. Queries that are scaled by their position (Llama 4) are scaled before the layer.
    """
    local = is_local_layer(layer, max_model_len)
    if not local and _class_of(layer) != ATTENTION:
        return [reason("class", ".".join(_class_of(layer)), SERVED_KINDS)]
    impl: Any = getattr(layer, "impl", None)
    checks: Iterable[tuple[bool, str, Any, str]] = (
        (layer.attn_type != "decoder", "attn_type", layer.attn_type, "all layers must use causal attention"),
        (
            not local and getattr(impl, "alibi_slopes", None) is not None,
            "alibi_slopes",
            len(impl.alibi_slopes) if getattr(impl, "alibi_slopes", None) is not None else None,
            ALIBI,
        ),
        (
            not local and getattr(impl, "chunk_lookback", -1) > -1,
            "chunk_lookback",
            getattr(impl, "chunk_lookback", -1),
            "a layer that attends to earlier chunks must have a window",
        ),
        (
            layer.kv_sharing_target_layer_name is not None,
            "kv_sharing_target_layer_name",
            layer.kv_sharing_target_layer_name,
            SHARED_CACHE,
        ),
        (
            not local and sees_images and layer.use_mm_prefix,
            "use_mm_prefix",
            True,
            MM_PREFIX,
        ),
        (
            not local and layer.head_size > CHECKED_DIMS and is_fp8(layer.kv_cache_dtype),
            "kv_cache_dtype",
            layer.kv_cache_dtype,
            UNCHECKED_FP8,
        ),
        (
            not local and layer.head_size_v != layer.head_size,
            "head_size_v",
            layer.head_size_v,
            f"keys and values must have the same head size, and that of the keys is {layer.head_size}",
        ),
    )
    return [reason(what, value, why) for wrong, what, value, why in checks if wrong]


def cache_dtype_reasons(cache_dtype: str, device: str, head_dim: int) -> list[str]:
    """Why a KV cache of this dtype is not supported.

    cache_dtype: vLLM's --kv-cache-dtype; device: "cpu" or "cuda"; head_dim: of the full-attention layers
    """
    checks: Iterable[tuple[bool, str, Any, str]] = (
        (
            cache_dtype not in CACHE_DTYPES[device],
            "kv_cache_dtype",
            cache_dtype,
            f"use one of {', '.join(CACHE_DTYPES[device])}",
        ),
        (
            head_dim > CHECKED_DIMS and is_fp8(cache_dtype),
            "kv_cache_dtype",
            cache_dtype,
            UNCHECKED_FP8,
        ),
    )
    return [reason(what, value, why) for wrong, what, value, why in checks if wrong]


def is_fp8(cache_dtype: str) -> bool:
    """cache_dtype: vLLM's --kv-cache-dtype"""
    return cache_dtype.startswith("fp8")


def default_block_size(device: str, bits: int = PLAIN_BITS, cache_dtype: str = "auto") -> int:
    """The default block size of the KV cache, in tokens.

    device: "cpu" or "cuda"; bits: `survivor_bits`; cache_dtype: vLLM's --kv-cache-dtype
    """
    packed_in_fp8 = device == "cuda" and bits != PLAIN_BITS and is_fp8(cache_dtype)
    return FP8_PACKED_BLOCK_SIZE if packed_in_fp8 else DEFAULT_BLOCK_SIZE[device]


def packed_problem(bits: int, dtype: str, table: Any = None, head_dim: int = 0) -> str | None:
    """Why a GPU cannot store survivors in this many bits, with the remedy; None if it can, or if nothing is rounded.

    dtype: the model's; table: the layer budgets, if any; head_dim: of the full-attention layers
    """
    if bits == PLAIN_BITS:
        return None
    if table:
        return (
            f"survivor_bits={bits}: on GPUs it cannot be combined with the layer budgets retention_ratio={table}. Use "
            "one ratio, or survivor_bits=16."
        )
    if bits != PACKED_BITS:
        return f"survivor_bits={bits}: not supported on GPUs. Use {PACKED_BITS} or 16."
    if dtype not in ("bfloat16", "float16"):
        return (
            f"survivor_bits={bits}: attention over packed survivors needs a model in 16 bits, not dtype={dtype}. Use "
            "--dtype bfloat16, or survivor_bits=16."
        )
    if head_dim > CHECKED_DIMS:
        return (
            f"survivor_bits={bits}: attention over packed survivors was not checked with heads of more than "
            f"{CHECKED_DIMS} dimensions, and head_dim={head_dim}. Use survivor_bits=16."
        )
    if head_dim % 16:
        return f"survivor_bits={bits}: head_dim={head_dim} is not a multiple of 16. Use survivor_bits=16."
    return None


def packed_reasons(layer: Any) -> list[str]:
    """Why attention over packed survivors cannot be merged into this layer's, judged from the loaded layer itself.

    FlashAttention 3 includes attention sinks in the log-sum-exp that it returns; other versions were not checked.
    """
    backend, impl = layer.attn_backend.get_name(), layer.impl
    version = getattr(impl, "vllm_flash_attn_version", None)
    soft_cap = getattr(impl, "logits_soft_cap", None)
    unknown = f"only supported with FlashAttention 3, not with {version}; use survivor_bits=16"
    checks: Iterable[tuple[bool, str, Any, str]] = (
        (
            backend != "FLASH_ATTN",
            "attention_backend",
            backend,
            "packed survivors need the log-sum-exp, which only FLASH_ATTN returns; use it, or survivor_bits=16",
        ),
        (bool(soft_cap) and version != 3, "logits_soft_cap", soft_cap, unknown),
        (getattr(impl, "sinks", None) is not None and version != 3, "sinks", "learned", unknown),
        (is_fp8(layer.kv_cache_dtype) and version != 3, "kv_cache_dtype", layer.kv_cache_dtype, unknown),
        (layer.head_size % 16 > 0, "head_size", layer.head_size, "not a multiple of 16; use survivor_bits=16"),
        (
            layer.head_size > CHECKED_DIMS,
            "head_size",
            layer.head_size,
            f"not checked above {CHECKED_DIMS}; use survivor_bits=16",
        ),
    )
    return [reason(what, value, why) for wrong, what, value, why in checks if wrong]


LAYER_SHAPE = ("num_heads", "num_kv_heads", "head_size", "kv_cache_dtype")


def layers_reasons(layers: Mapping[str, Any]) -> list[str]:
    """Why these layers (by name), each of which is supported, cannot be compressed together."""
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
    """Turn the errors of transformers, vLLM and the model hub for a model they cannot find or read into a UsageError.

    Other errors pass through: those of the operating system, such as a port in use, which unlike these have an `errno`;
    libraries that cannot be loaded; network errors, which are types of their own.

    name: of the model; None: unknown
    """
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as e:
        text = message_of(e)
        unreadable = ("Unrecognized model", "Invalid repository ID or local directory", "Repo id must be")
        if isinstance(e, OSError):
            of_model = type(e) is OSError or type(e).__module__.startswith("huggingface_hub.")
            found = of_model and e.errno is None and "shared object" not in text
        else:
            found = text.startswith(unreadable)
        if not found:
            raise
        why = text.strip().partition("\n")[0].rstrip(".")
        whose = "" if name is None else f"{name}: "
        raise UsageError(
            f"{whose}the model's config.json cannot be read ({why}); give the folder of a model, with its config.json "
            "and weights, or its name on a model hub that this machine can reach."
        ) from e
