"""Reads our options from vLLM's configuration, and refuses by name what is not supported."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.logger import init_logger

from kvllm import support
from kvllm.checks import check_cache_dtype, check_geometry, check_positions, check_survivor_bits
from kvllm.compression.footprint import BANK_SHARE, fitting_max_num_seqs, footprint
from kvllm.compression.rounding import Rounding, packed_block_tokens
from kvllm.config import CONFIG_KEY, METHOD_KEY, METHOD_NAME, RATIO_KEY, KvConfig, check_retention_ratio
from kvllm.errors import UsageError
from kvllm.groups import Groups, full_attention_block_size, full_layers, groups_of_model
from kvllm.layers import Heads, LayerKind, full_heads, has_other_heads, local_layers
from kvllm.layout import RequestGeometry, request_geometry
from kvllm.methods import checked_config, with_budgets
from kvllm.options import check_value
from kvllm.support import DEFAULT_BLOCK_SIZE, PLAIN_BITS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers


def kv_config(vllm_config: VllmConfig) -> KvConfig | None:
    """Our options in `additional_config`, or None if it has none; UsageError if they are invalid.

    Includes the layer budgets that the method derives from one ratio (`kvllm.methods.with_budgets`).
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or CONFIG_KEY not in additional:
        return None
    return with_budgets(checked_config(additional[CONFIG_KEY]), full_layers(local_layers_of(vllm_config)))


def request_ratio(config: KvConfig, params: SamplingParams | None) -> float:
    """The retention ratio of one request: its own `kv_retention_ratio`, or the engine's.

    Raises UsageError unless it is a number in (0, 1]. `engine/requests.py` checks on arrival whether it is allowed.
    """
    extra = (params.extra_args or {}) if params is not None else {}
    if RATIO_KEY not in extra:
        return config.mean_ratio
    return check_retention_ratio(extra[RATIO_KEY], RATIO_KEY)


def request_method(config: KvConfig, params: SamplingParams | None) -> str:
    """The name of one request's method: its own `kv_method`, or the engine's.

    Raises UsageError unless it is a string. `engine/requests.py` checks on arrival whether the engine has it.
    """
    extra = (params.extra_args or {}) if params is not None else {}
    return check_value(METHOD_NAME, METHOD_KEY, extra[METHOD_KEY]) if METHOD_KEY in extra else config.method


def kernel_block_size(vllm_config: VllmConfig) -> int:
    """Block size of the compressed layers' attention kernels in tokens, b of docs/design.md.

    It is also the allocator's, except for models with recurrent layers: once such a model is loaded, vLLM enlarges the
    allocator's blocks until a state fits in one. Where local layers have more KV per token, it is a multiple of
    --block-size (`Groups.scale`).
    """
    if vllm_config.model_config.is_hybrid:
        return DEFAULT_BLOCK_SIZE[vllm_config.device_config.device_type]
    longest, num_shards = vllm_config.model_config.max_model_len, vllm_config.parallel_config.tensor_parallel_size
    size = vllm_config.cache_config.block_size
    return full_attention_block_size(text_config(vllm_config), longest, size, num_shards)


def num_late_events(vllm_config: VllmConfig) -> int:
    """Events whose blocks are not yet freed when later ones are due: 0, except for models with recurrent layers.

    vLLM zeroes their new blocks before a step's events, so a block is freed only once all steps that read it are done.
    """
    return vllm_config.max_concurrent_batches if vllm_config.model_config.is_hybrid else 0


def packed_tokens(vllm_config: VllmConfig) -> int | None:
    """Survivors per packed block; None if survivors are not packed, as on CPUs."""
    config = kv_config(vllm_config)
    if config is None or config.survivor_bits == PLAIN_BITS or vllm_config.device_config.device_type == "cpu":
        return None
    head_dim, cache_dtype = heads_of_engine(vllm_config).head_dim, vllm_config.cache_config.cache_dtype
    return packed_block_tokens(kernel_block_size(vllm_config), head_dim, config.survivor_bits, cache_dtype)


class Geometries:
    """The geometry of each request, by its ratio. Client, scheduler and worker compute the same ones."""

    def __init__(self, config: KvConfig, block_size: int, packed_tokens: int | None = None) -> None:
        self.config = config
        self.block_size = block_size
        self.packed_tokens = packed_tokens
        # Cached, since the scheduler looks it up for every running request in every step.
        self._own = config.mean_ratio
        self._made: dict[float, RequestGeometry | None] = {}
        self.of_ratio = functools.lru_cache(maxsize=1024)(self._of_ratio)

    def of(self, params: SamplingParams | None) -> RequestGeometry | None:
        """The request's geometry; None if it is not compressed. UsageError if its ratio does not fit the sizes."""
        extra = params.extra_args if params is not None else None
        return self.of_ratio(request_ratio(self.config, params) if extra else self._own)

    def _of_ratio(self, ratio: float) -> RequestGeometry | None:
        ratio = self.config.nearest_ratio(ratio)
        if ratio not in self._made:
            self._made[ratio] = request_geometry(self.config, self.block_size, ratio, self.packed_tokens)
        return self._made[ratio]

    @classmethod
    def of_engine(cls, vllm_config: VllmConfig) -> Geometries:
        config = kv_config(vllm_config)
        assert config is not None
        return cls(config, kernel_block_size(vllm_config), packed_tokens(vllm_config))


def prepare(vllm_config: VllmConfig) -> KvConfig | None:
    """Check a new engine's configuration and adapt it to compression; a no-op if KvLLM is not configured.

    Raises UsageError, with the option, its value and the remedy, for what is not supported.
    """
    config = kv_config(vllm_config)
    if config is None:
        return None
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device not in DEFAULT_BLOCK_SIZE:
        raise UsageError(f"KvLLM supports the platforms {' and '.join(DEFAULT_BLOCK_SIZE)}; this one is {device!r}.")
    cache = vllm_config.cache_config
    if not cache.user_specified_block_size:
        cache.block_size = support.default_block_size(device, config.survivor_bits, cache.cache_dtype)
        cache.user_specified_block_size = True
    offloading = support.offloading_reasons(vllm_config, device, config.prompt_budget, len(config.parts))
    for found in (*support.engine_reasons(vllm_config, device), *offloading):
        raise UsageError(f"KvLLM does not support {found}.")
    _check_survivor_bits(config, device, vllm_config)
    block_size = kernel_block_size(vllm_config)
    check_geometry(config, block_size, vllm_config.model_config.max_model_len, packed_tokens(vllm_config))
    if envs.VLLM_USE_RUST_FRONTEND:
        raise UsageError(
            "KvLLM does not support VLLM_USE_RUST_FRONTEND=1, with which requests reach the engine unchecked. Unset it."
        )
    _check_positions(config, vllm_config.model_config)
    check_cache_dtype(config, cache.cache_dtype, device, heads_of_engine(vllm_config).head_dim)
    _check_budgets(config, vllm_config)
    # Cascade attention reads the common prefix from the block tables before they are shortened.
    vllm_config.model_config.disable_cascade_attn = True
    scheduler = "KvAsyncScheduler" if vllm_config.scheduler_config.async_scheduling else "KvScheduler"
    vllm_config.scheduler_config.scheduler_cls = f"kvllm.engine.scheduler.{scheduler}"
    return config


def groups_of_engine(vllm_config: VllmConfig) -> Groups:
    """The KV cache groups that vLLM should make of the model's layers; UsageError if layer budgets do not fit them."""
    config, text = kv_config(vllm_config), text_config(vllm_config)
    num_shards = vllm_config.parallel_config.tensor_parallel_size if has_other_heads(text) else 1
    return groups_of_model(text, vllm_config.model_config.max_model_len, config.budgets if config else (), num_shards)


def heads_of_engine(vllm_config: VllmConfig) -> Heads:
    """The heads of the full-attention layers on one device."""
    model, parallel, text = vllm_config.model_config, vllm_config.parallel_config, text_config(vllm_config)
    num_heads = model.get_num_attention_heads(parallel)
    if not has_other_heads(text):
        return Heads(num_heads, model.get_num_kv_heads(parallel), model.get_head_size())
    heads = full_heads(text)  # vLLM has the most of all layers
    return Heads(num_heads, max(1, heads.num_kv_heads // parallel.tensor_parallel_size), heads.head_dim)


def _check_budgets(config: KvConfig, vllm_config: VllmConfig) -> None:
    """Raise UsageError if layer budgets are not supported with this configuration."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if config.budgets and stages > 1:
        raise UsageError(
            f"retention_ratio={config.retention_ratio}: cannot be combined with pipeline_parallel_size={stages}, since "
            "a stage has only some of the groups of layers. Use tensor parallelism, or one ratio for all layers."
        )
    if config.budgets and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise UsageError(
            f"retention_ratio={config.retention_ratio}: cannot be combined with --disable-hybrid-kv-cache-manager, "
            "since each ratio needs a KV cache group. Leave it out, or use one ratio for all layers."
        )
    groups_of_engine(vllm_config)


def local_layers_of(vllm_config: VllmConfig) -> list[LayerKind]:
    """The kind of each layer of the engine's model; None: full attention."""
    return local_layers(text_config(vllm_config), vllm_config.model_config.max_model_len)


def text_config(vllm_config: VllmConfig) -> Any:
    """transformers' config of the engine's model; of a multimodal model, that of its language model."""
    return vllm_config.model_config.hf_config.get_text_config()


def _check_positions(config: KvConfig, model_config: Any) -> None:
    """`check_positions`, if prompts may have images, and images positions of their own."""
    multimodal = model_config.multimodal_config
    if multimodal is not None and not multimodal.language_model_only and model_config.uses_mrope:
        check_positions(config)


def why_not_inspected(engine_args: Any, error: ValueError) -> str | None:
    """An error message if vLLM could not import a model's code because torchvision is missing; None for other errors.

    vLLM itself only reports that the architectures "failed to be inspected", with the reason in another process's log.
    """
    if CONFIG_KEY not in (engine_args.additional_config or {}) or "failed to be inspected" not in str(error):
        return None
    problem = support.torchvision_problem()
    return problem and (
        f"KvLLM cannot start {engine_args.model}: vLLM could not load its code, and {problem}. Models that accept "
        "images need the torchvision that matches torch, from the same index: uv pip install torchvision "
        "--torch-backend cpu (or auto, on a GPU)."
    )


def fewer_seqs(vllm_config: VllmConfig) -> int | None:
    """A max_num_seqs below vLLM's default, to limit the query bank on a GPU; None if the default is small enough."""
    config, memory = kv_config(vllm_config), gpu_memory()
    if config is None or memory is None:
        return None
    parallel, default = vllm_config.parallel_config, vllm_config.scheduler_config.max_num_seqs
    model = copy.copy(vllm_config.model_config.hf_text_config)
    model.dtype = vllm_config.model_config.dtype  # the engine's, which may differ from the checkpoint's
    try:
        one = footprint(model, config, 1, max_model_len=vllm_config.model_config.max_model_len)
    except Exception as e:  # transformers may fail in any way for a model that only vLLM knows
        logger.warning(
            "KvLLM: max_num_seqs stays at vLLM's default of %d, since the weights' size is unknown (%s)", default, e
        )
        return None
    num_shards = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    fitting = fitting_max_num_seqs(memory, vllm_config.cache_config.gpu_memory_utilization, one, num_shards)
    if fitting >= default:
        return None
    logger.info(
        "KvLLM: max_num_seqs=%d instead of vLLM's default of %d: the queries of each take %.1f MiB, and those of more "
        "would take over %.0f%% of the memory that the weights leave free. Set --max-num-seqs to choose another.",
        fitting,
        default,
        one.query_bank / num_shards / 2**20,
        100 * BANK_SHARE,
    )
    return fitting


def gpu_memory() -> int | None:
    """Bytes of this process's GPU; None on a CPU, where the KV cache's memory is configured separately."""
    from vllm.platforms import current_platform

    return current_platform.get_device_total_memory() if current_platform.is_cuda() else None


def _check_survivor_bits(config: KvConfig, device: str, vllm_config: VllmConfig) -> None:
    """Raise UsageError if survivors cannot be rounded; on a CPU, log that rounding saves no memory."""
    bits, model_config = config.survivor_bits, vllm_config.model_config
    if bits == PLAIN_BITS:
        return
    if model_config.is_hybrid:
        raise UsageError(f"survivor_bits={bits}: not supported for models with recurrent layers. Use survivor_bits=16.")
    head_dim, cache_dtype = heads_of_engine(vllm_config).head_dim, vllm_config.cache_config.cache_dtype
    rounding = Rounding.from_config(config, kernel_block_size(vllm_config), head_dim, cache_dtype)
    assert rounding is not None
    if device == "cpu":
        logger.info(
            "KvLLM: survivor_bits=%d: on a CPU, survivors are rounded in runs of %d tokens but stored in the cache's "
            "own dtype: outputs are the same as with packed storage, but no memory is saved.",
            bits,
            rounding.block_tokens,
        )
        return
    dtype = str(model_config.dtype).removeprefix("torch.")
    if envs.VLLM_BATCH_INVARIANT:
        raise UsageError(
            f"survivor_bits={bits}: cannot be combined with VLLM_BATCH_INVARIANT, since the order of sums over packed "
            "survivors depends on the batch. Unset it, or use survivor_bits=16."
        )
    check_survivor_bits(config, dtype, head_dim)
