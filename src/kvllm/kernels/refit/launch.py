"""Move survivors as `compact` does, and refit them to compensate for evicted tokens (`kvllm.methods.refit`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvllm.kernels.compact import compact_ref
from kvllm.kernels.paged import PagedCache, next_power_of_2
from kvllm.kernels.queries import DueQueries
from kvllm.kernels.refit.attend import _attend_kernel
from kvllm.kernels.refit.fit import _fit_kernel
from kvllm.kernels.windows import FP8_MAX, gather_window_ref, scatter_rows_ref
from kvllm.layout import ceil_div
from kvllm.methods.attended import attend
from kvllm.methods.kara import MOST_REFITTED
from kvllm.methods.refit import LEAST_DAMPING, LEAST_KEPT, STEPS, gather_tokens
from kvllm.methods.refit import refit as refit_survivors

# Requests of one pair of launches: what passes between the two takes about 60 MB a request of an 8B model.
_BATCH = 2
# A head's matrix [num_kept, num_kept], and that of its dimensions, stay in the registers of one program.
MOST_DIMS = 128


def refit_ref(
    queries: DueQueries, kept: Tensor, candidate_blocks: Tensor, cache: PagedCache, key_ridge: float, value_ridge: float
) -> None:
    """Candidate j := candidate kept[j], for every head its own, with keys and values refitted as Kara does; in float64.

    kept:             [num_due, num_layers, num_kv_heads, num_kept], ascending
    candidate_blocks: [num_due, num_candidates / block_size], block ids; no block twice
    key_ridge, value_ridge: 0: the keys, or the values, move bit for bit
    """
    asked = queries.rotated_ref().permute(0, 2, 3, 1, 4).flatten(2, 3)
    window = gather_window_ref(candidate_blocks, cache, torch.float64)
    keys, values = (t.transpose(1, 2) for t in window)  # [batch, num_kv_heads, num_candidates, head_dim]
    asked = asked * cache.head_dim**-0.5
    indices = kept.flatten(0, 1).long()
    own_keys, own_values = gather_tokens(keys, indices), gather_tokens(values, indices)
    new_keys, new_values = refit_survivors(
        asked, own_keys, own_values, attend(asked, keys, values), key_ridge, value_ridge
    )
    compact_ref(kept, candidate_blocks, cache)
    if key_ridge > 0:
        scatter_rows_ref(new_keys.transpose(1, 2), candidate_blocks, cache.keys, cache.k_scale)
    if value_ridge > 0:
        scatter_rows_ref(new_values.transpose(1, 2), candidate_blocks, cache.values, cache.v_scale)


class Tiles(NamedTuple):
    """How the two launches cut their work."""

    block_q: int  # queries of a program of the first
    block_t: int  # candidates that it sees at once
    attend_warps: int
    attend_stages: int
    block_r: int  # queries that a program of the second sees at once
    block_c: int  # dimensions of the values that it fits
    solve_warps: int
    solve_stages: int


def tiles(num_rows: int, head_dim: int, float32: bool) -> Tiles:
    block_q = min(64, max(16, next_power_of_2(num_rows)))
    block_c = max(16, next_power_of_2(head_dim))
    if float32:  # no tensor cores: small tiles, so that the operands of the plain product fit the registers
        return Tiles(16, 32, 8, 1, 16, 16, 8, 1)
    return Tiles(block_q, 64, 4, 2, block_q, block_c, 8, 2)


def refit(
    queries: DueQueries, kept: Tensor, candidate_blocks: Tensor, cache: PagedCache, key_ridge: float, value_ridge: float
) -> None:
    """`refit_ref` in Triton, two launches for every few requests.

    The first has a program for each request, layer, KV head and tile of queries. It finds what the queries get from
    the window and not from the survivors, how they divide their attention among these, and what share of it these have.
    The second solves for a head's values, some dimensions a program, and in one more for the keys' shift, and writes
    them.
    """
    bank = queries.bank
    num_layers, head_dim = len(bank.queries), bank.head_dim
    num_due, _, num_kv_heads, num_kept = kept.shape
    assert bank.queries.is_contiguous() and kept.is_contiguous() and candidate_blocks.stride(1) == 1
    assert (num_layers, num_kv_heads) == (cache.num_layers, cache.num_kv_heads) == kept.shape[1:3]
    assert num_due == len(queries) == len(candidate_blocks) and head_dim == cache.head_dim
    assert num_kept <= MOST_REFITTED and head_dim <= MOST_DIMS and bank.num_kv_heads == num_kv_heads
    if not num_due:
        return
    float32 = cache.dtype == torch.float32
    num_rows = queries.num_rows
    sizes = tiles(num_rows, head_dim, float32)
    tallest = max(sizes.block_q, sizes.block_r)
    padded_rows = ceil_div(num_rows, tallest) * tallest
    block_k = max(16, next_power_of_2(num_kept))
    dtype = cache.dot_dtype
    heads, device = num_layers * num_kv_heads, bank.queries.device
    batch = min(num_due, _BATCH) * heads
    shares = missing = lost = None
    if value_ridge > 0:
        shares = torch.empty(batch, padded_rows, block_k, dtype=dtype, device=device)
        missing = torch.empty(batch, padded_rows, head_dim, dtype=dtype, device=device)
    if key_ridge > 0:
        lost = torch.empty(batch, padded_rows, dtype=torch.float32, device=device)
    common = dict(
        **cache.sizes,
        **queries.sizes(dtype),
        NUM_KEPT=num_kept,
        PADDED_ROWS=padded_rows,
        FIT_KEYS=key_ridge > 0,
        FIT_VALUES=value_ridge > 0,
        BLOCK_K=block_k,
    )
    for blocks, survivors, part in zip(
        candidate_blocks.split(_BATCH), kept.split(_BATCH), queries.split(_BATCH), strict=True
    ):
        cached, asked = cache.arguments(blocks), part.arguments()
        _attend_kernel[(len(part) * heads * padded_rows // sizes.block_q,)](
            *(shares, missing, lost, survivors, *cached, *asked, head_dim**-0.5 / math.log(2), LEAST_KEPT),
            NUM_CANDIDATES=candidate_blocks.shape[1] * cache.block_size,
            BLOCK_Q=sizes.block_q,
            BLOCK_T=sizes.block_t,
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            num_warps=sizes.attend_warps,
            num_stages=sizes.attend_stages,
            **common,
        )
        num_columns = ceil_div(head_dim, sizes.block_c)
        _fit_kernel[(len(part) * heads * (num_columns + 1),)](
            *(shares, missing, lost, survivors, *cached, *asked, head_dim**-0.5, key_ridge, value_ridge, LEAST_DAMPING),
            STEPS=STEPS,
            RAW_DTYPE=cache.raw_tl_dtype,
            FP8_MAX=FP8_MAX,
            PRECISION="ieee" if float32 else "tf32",
            NUM_COLUMNS=num_columns,
            BLOCK_R=sizes.block_r,
            BLOCK_C=sizes.block_c,
            num_warps=sizes.solve_warps,
            num_stages=sizes.solve_stages,
            **common,
        )
