"""The start-up summary that an engine logs once its KV cache is sized: settings, capacity, what requests may choose."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import kvllm
from kvllm.compression.blocks import peak_allocator_blocks
from kvllm.compression.query_bank import QueryBank
from kvllm.config import METHOD_KEY, RATIO_KEY, KvConfig
from kvllm.engine.settings import groups_of_engine, heads_of_engine, local_layers_of, num_late_events
from kvllm.groups import Groups
from kvllm.layers import LayerKind
from kvllm.layout import RequestGeometry, ceil_div

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PROMPT = 256  # tokens, as in `kvllm plan`
GIB = 2**30
IN_FLIGHT = 2  # steps scheduled before the blocks that they no longer need are freed


def summary(
    vllm_config: VllmConfig,
    config: KvConfig,
    geometry: RequestGeometry | None,
    num_blocks: int,
    page_bytes: int,
    block_size: int,
) -> str:
    """The summary of one engine, in several lines.

    geometry:   of a request without a ratio of its own; None: it is not compressed
    num_blocks: blocks in the pool, without the null block
    page_bytes: bytes of a block in one layer on one device
    """
    scheduler, length = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    bank = bank_bytes(vllm_config, config)
    lines = [
        f"KvLLM {kvllm.__version__}: {what_is_on(config)}",
        f"KV cache: {num_blocks} blocks of {block_size} tokens.",
        f"Query bank: {bank / GIB:.2f} GiB on each device, for max_num_seqs={scheduler.max_num_seqs} requests.",
    ]
    prompt = min(PROMPT, length // 2)
    every = groups_of_engine(vllm_config)
    groups = Groups.of(stage_layers(vllm_config), len(config.parts))
    groups = replace(groups, scale=every.scale, local_scale=every.local_scale)
    in_flight = IN_FLIGHT * scheduler.max_num_batched_tokens
    local = groups.peak_local_blocks(prompt, length, block_size, in_flight, IN_FLIGHT)
    whole = len(config.parts) * ceil_div(length, block_size)
    needed = local + whole
    if geometry:
        late = num_late_events(vllm_config)
        needed = local + sum(peak_allocator_blocks(g, prompt, length, block_size, late) for g in geometry.groups)
    overridden = vllm_config.cache_config.num_gpu_blocks_override is not None
    more = 0 if overridden or not on_gpu(vllm_config) else bank // (page_bytes * groups.group_size)
    ours, stock = num_blocks // needed, (num_blocks + more) // (local + whole)
    most = f"; max_num_seqs lets {scheduler.max_num_seqs} run" if ours > scheduler.max_num_seqs else ""
    lines.append(
        f"Requests of max_model_len={length} tokens ({prompt} of them prompt) that fit at once: {ours}; without "
        f"compression, and with the query bank's memory added to the KV cache: {stock}{most}."
    )
    lines.append(what_requests_may_ask(config))
    return "\n  ".join(lines)


def what_is_on(config: KvConfig) -> str:
    """The compression settings in one or two sentences."""
    if not config.enabled:
        return f"compression is off (retention_ratio={config.mean_ratio}) unless a request asks for it."
    if config.policy == "budget":
        kept = (
            f"policy budget, method {config.method}: every {config.budget_interval} tokens the generated text is cut "
            f"to {config.budget_size} tokens"
        )
    else:
        share = f"{100 * config.mean_ratio:g}%"
        kept = f"method {config.method} keeps {share} of every {config.window_size} generated tokens"
        if config.budgets:
            groups = "; ".join(f"layers {budget.key}: {100 * budget.ratio:g}%" for budget in config.budgets)
            kept += f" on average ({groups})"
        if config.history_size:
            kept += f", at most {config.history_size} tokens of compressed windows"
    bits = f" Survivors are rounded to {config.survivor_bits} bits." if config.survivor_bits < 16 else ""
    prompts = f"longer ones are cut to {config.prompt_budget} tokens" if config.prompt_budget else "they stay whole"
    return f"{kept}; the newest {config.buffer_size} are never compressed. Prompts: {prompts}.{bits}"


def what_requests_may_ask(config: KvConfig) -> str:
    (own, _), *others = config.request_ratio_ranges
    allowed = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in others)
    ratios = f"Requests may choose {RATIO_KEY} {allowed} in vllm_xargs; the default is {own}."
    if not others:
        ratios = f"Requests may not choose a {RATIO_KEY} other than {own} (--request-ratios would allow it)."
    own_method, *other_methods = config.methods
    if not other_methods:
        return ratios
    return f"{ratios} They may choose {METHOD_KEY} {', '.join(other_methods)}; the default is {own_method}."


def stage_layers(vllm_config: VllmConfig) -> list[LayerKind]:
    """The kinds of the layers on one device, as in `local_layers`."""
    start, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    return local_layers_of(vllm_config)[start:end]


def bank_bytes(vllm_config: VllmConfig, config: KvConfig) -> int:
    """Bytes of the query bank on one device."""
    heads = heads_of_engine(vllm_config)
    bank = QueryBank.allocate(
        stage_layers(vllm_config).count(None), vllm_config.scheduler_config.max_num_seqs, config.num_queries,
        heads.num_heads, heads.num_kv_heads, heads.head_dim, config.query_stride, vllm_config.model_config.dtype,
        device="meta",
    )  # fmt: skip
    return bank.num_bytes


def on_gpu(vllm_config: VllmConfig) -> bool:
    return vllm_config.device_config.device_type == "cuda"
