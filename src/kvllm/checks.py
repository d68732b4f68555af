"""Settings that do not fit one another or the model: refused by the engine at start-up, and by `kvllm plan` before.

Nothing here imports vLLM. Which models, layers and vLLM options are supported is decided in `kvllm.support`.
"""

from __future__ import annotations

from typing import Any

from kvllm import support
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.groups import full_layers
from kvllm.layers import full_heads, local_layers
from kvllm.layout import Geometry, request_geometry
from kvllm.methods import make_methods
from kvllm.methods.base import LayerShape


def allowed_geometries(config: KvConfig, block_size: int, packed_tokens: int | None = None) -> list[Geometry]:
    """Every distinct geometry that a compressed request can have; `config` must not have layer budgets."""
    made = (Geometry.from_config(config, block_size, ratio, packed_tokens) for ratio in config.all_ratios)
    return list(dict.fromkeys(geometry for geometry in made if geometry is not None))


def check_geometry(config: KvConfig, block_size: int, max_model_len: int | None, packed_tokens: int | None) -> None:
    """Raise UsageError for sizes that do not fit the block size, or a prompt budget that could never take effect.

    block_size:    tokens in a block of the compressed layers
    max_model_len: maximum text length, prompt included; None: unknown
    packed_tokens: survivors per packed block; None if survivors are not packed
    """
    geometry = request_geometry(config, block_size, packed_tokens=packed_tokens)
    try:
        for part in config.parts:
            allowed_geometries(part, block_size, packed_tokens)
    except UsageError as e:
        raise UsageError(f"request_ratios={config.request_ratios!r}: {e}") from e
    if geometry is None or not geometry.prompt_budget or max_model_len is None:
        return
    # The shortest prompt that is cut has one block more than the budget, and the step that starts at event 0 cuts it.
    first = geometry.shape(0).num_candidates
    most = max_model_len - 1 - block_size - first - geometry.buffer_size
    if geometry.prompt_budget > most:
        raise UsageError(
            f"prefix_budget_exhausted: prompt_budget={config.prompt_budget}: a longer prompt, the {first} tokens of "
            f"the first compression and the buffer of {config.buffer_size} exceed max_model_len={max_model_len}, so no "
            "prompt would ever be cut. Use a prompt_budget of at most "
            f"{max(most, 0) // block_size * block_size} (0: prompts stay whole), or a larger --max-model-len."
        )


def check_cache_dtype(config: KvConfig, cache_dtype: str, device: str, head_dim: int) -> None:
    """Raise UsageError if a KV cache of this dtype is not supported. Arguments: as of `cache_dtype_reasons`"""
    for found in support.cache_dtype_reasons(cache_dtype, device, head_dim):
        raise UsageError(f"KvLLM does not support {found}.")
    if config.budgets and support.is_fp8(cache_dtype):
        raise UsageError(
            f"retention_ratio={config.retention_ratio}: cannot be combined with kv_cache_dtype={cache_dtype}. Leave it "
            "at auto, or use one ratio for all layers."
        )


def check_survivor_bits(config: KvConfig, dtype: str, head_dim: int) -> None:
    """Raise UsageError if a GPU cannot pack the survivors. Arguments: as of `packed_problem`"""
    table = config.retention_ratio if config.budgets else None
    if problem := support.packed_problem(config.survivor_bits, dtype, table, head_dim):
        raise UsageError(problem)


def check_positions(config: KvConfig) -> None:
    """Refuse a method that uses indices as rotary positions, for a model where images may make them differ."""
    for name, method in make_methods(config).items():
        if method.counts_positions:
            option = "method" if name == config.method else "request_methods"
            found = support.reason(option, name, support.COUNTS_POSITIONS)
            raise UsageError(f"KvLLM does not support {found}, or --language-model-only to accept no images.")


def check_files(config: KvConfig, text: Any, max_model_len: int | None) -> None:
    """Raise UsageError if a file of the method was made for another model, as each worker does for its own heads.

    text, max_model_len: as in `local_layers`
    """
    heads, numbers = full_heads(text), full_layers(local_layers(text, max_model_len))
    shape = LayerShape(1 + numbers[-1], heads.num_heads, heads.num_kv_heads, heads.head_dim)
    for method in make_methods(config).values():
        method.check_layers(shape)
