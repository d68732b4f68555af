"""`kvllm plan`: how many requests of which length fit a device, from the model's config alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from kvllm.checks import check_cache_dtype, check_files, check_positions, check_survivor_bits
from kvllm.compression.footprint import Footprint, dtype_of, head_dim_of
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.groups import Groups
from kvllm.layers import Recurrent
from kvllm.layout import RequestGeometry, ceil_div
from kvllm.options import parse_numbers
from kvllm.support import has_mrope

# Not pydantic.ByteSize, which ignores trailing text: it parses 1.2.3G as 1.2 bytes.
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# Blocks outside a sliding window are freed only after the steps in flight: asynchronous scheduling has two, and on a
# large GPU, vLLM's server prefills up to this many tokens per step.
STEPS_IN_FLIGHT, PREFILL_TOKENS = 2, 8192


@dataclass(frozen=True)
class Row:
    """For requests of `length` tokens, prompt included: peak blocks per request in all groups, and how many fit."""

    length: int
    stock_blocks: int
    stock_requests: int
    kvllm_blocks: int
    kvllm_requests: int


@dataclass(frozen=True)
class Plan:
    pool_bytes: int
    num_blocks: int
    stock_num_blocks: int
    block_size: int
    num_prompt_tokens: int
    footprint: Footprint
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    footprint: Footprint,
    pool_bytes: int,
    geometry: RequestGeometry | None,
    block_size: int,
    num_prompt_tokens: int,
    lengths: Sequence[int],
) -> Plan:
    """Compute how many requests fit, each counted at its peak; geometry None: no compression.

    pool_bytes: KvLLM's pool; stock vLLM's is larger by the query bank
    """
    if isinstance(footprint.groups.local, Recurrent):
        raise UsageError(
            "kvllm plan does not support recurrent layers. Start the engine (kvllm serve); its log says how many "
            "requests fit."
        )
    block_bytes = footprint.kv_per_token * block_size
    num_blocks, stock_num_blocks = pool_bytes // block_bytes, (pool_bytes + footprint.query_bank) // block_bytes
    rows = []
    for length in lengths:
        if length <= num_prompt_tokens:
            raise UsageError(
                f"--length {length}: this is the total, prompt included; use more than --prompt-tokens "
                f"{num_prompt_tokens}."
            )
        stock = footprint.groups.num_full * ceil_div(length, block_size)
        ours = geometry.peak_blocks(num_prompt_tokens, length) if geometry else stock
        local = local_blocks(footprint.groups, block_size, num_prompt_tokens, length)
        stock, ours = stock + local, ours + local
        # - 1: vLLM's null block.
        rows.append(Row(length, stock, (stock_num_blocks - 1) // stock, ours, (num_blocks - 1) // ours))
    return Plan(pool_bytes, num_blocks, stock_num_blocks, block_size, num_prompt_tokens, footprint, rows)


def check(
    config: KvConfig, model_config: Any, kv_cache_dtype: str, max_model_len: int | None, language_model_only: bool
) -> None:
    """Raise UsageError for settings that an engine on a GPU would refuse for this model, which itself is supported.

    model_config: a transformers config
    """
    text = model_config.get_text_config()
    head_dim = head_dim_of(text)
    check_cache_dtype(config, kv_cache_dtype, "cuda", head_dim)
    check_survivor_bits(config, dtype_of(model_config), head_dim)
    if text is not model_config and not language_model_only and has_mrope(model_config):
        check_positions(config)
    check_files(config, text, max_model_len)


def local_blocks(groups: Groups, block_size: int, num_prompt_tokens: int, length: int) -> int:
    """Peak number of blocks of local groups that a request holds, during prefill or later."""
    in_flight = STEPS_IN_FLIGHT * PREFILL_TOKENS
    return groups.peak_local_blocks(num_prompt_tokens, length, block_size, in_flight, STEPS_IN_FLIGHT)


def pool_bytes(memory: int, utilization: float, reserve: int, footprint: Footprint) -> int:
    """Bytes left for KvLLM's KV cache, as in vLLM: a share of the memory, minus weights, query bank and reserve."""
    left = int(memory * utilization) - reserve - footprint.weights - footprint.query_bank
    if left <= 0:
        raise UsageError(
            f"--memory {memory / 2**30:.1f}GiB: the weights ({footprint.weights / 2**30:.1f} GiB), the query bank "
            f"({footprint.query_bank / 2**30:.1f} GiB, less with a smaller --max-num-seqs) and the reserve "
            f"({reserve / 2**30:.1f} GiB) leave nothing for the KV cache at --gpu-memory-utilization {utilization}."
        )
    return left


def summary(plan: Plan) -> str:
    """Memory use in one line."""
    gib, groups = 2**30, plan.footprint.groups
    num_groups = groups.num_full + groups.num_local
    return (
        f"weights {plan.footprint.weights / gib:.2f} GiB, query bank {plan.footprint.query_bank / gib:.2f} GiB, "
        f"KV pool {plan.pool_bytes / gib:.2f} GiB = {plan.num_blocks} blocks of {plan.block_size} tokens "
        f"(stock: {plan.stock_num_blocks}), {plan.footprint.kv_per_token / 2**10:.1f} KiB per token"
        + (f" and KV cache group, of which {_of(groups.num_full, num_groups)} compressed" if num_groups > 1 else "")
    )


def _of(num_compressed: int, num_groups: int) -> str:
    if num_compressed == num_groups:
        return f"all {num_groups} are"
    return f"{num_compressed} of {num_groups} {'is' if num_compressed == 1 else 'are'}"


def table(plan: Plan) -> Table:
    """One row per length."""
    made = Table(title=f"requests that fit at once, prompts of {plan.num_prompt_tokens} tokens")
    for name in ("total length", "blocks, stock", "blocks, KvLLM", "requests, stock", "requests, KvLLM", "gain"):
        made.add_column(name, justify="right")
    for row in plan.rows:
        gain = f"{row.kvllm_requests / row.stock_requests:.2f}x" if row.stock_requests else "-"
        cells = (row.length, row.stock_blocks, row.kvllm_blocks, row.stock_requests, row.kvllm_requests)
        made.add_row(*map(str, cells), gain)
    return made


def parse_bytes(text: str, option: str = "--memory") -> int:
    """Parse a size such as 80GiB, 24G or 512MB to bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in UNITS:
        raise UsageError(f"{option} {text}: expected a size such as 80GiB, 24GB or 512MiB.")
    size = int(float(match[1]) * UNITS[match[2]])
    if not match[2] and 0 < size < 1024:
        raise UsageError(f"{option} {text}: without a unit this is a number of bytes; did you mean {text.strip()}GiB?")
    return size


def parse_lengths(text: str) -> list[int]:
    """Parse request lengths such as 2048,8192."""
    return parse_numbers("--length", text, int, "2048,8192")
