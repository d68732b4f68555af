"""Bidirectional scores of the candidates of all requests that are due, for all layers in one launch or three."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvllm.kernels.paged import PagedCache, next_power_of_2
from kvllm.kernels.queries import DueQueries
from kvllm.kernels.window_scores.attention import _log_sums_kernel, _scores_kernel
from kvllm.kernels.window_scores.weights import _weights_kernel
from kvllm.kernels.windows import gather_window_ref
from kvllm.layout import ceil_div

# Two key tiles of this size fit, with the queries, in the shared memory of a Hopper or Ampere multiprocessor. So two
# programs share a multiprocessor, and one computes while the other loads.
_TILE_BYTES = 64 * 1024
# Of the largest heads for which tiles of queries and keys were checked to fit in it.
MOST_DIMS = 256


def window_scores_ref(
    queries: DueQueries,
    candidate_blocks: Tensor,
    cache: PagedCache,
    value_norm: bool = True,
    keydiff_power: float = 0.0,
    attention_floor: float = 0.0,
) -> Tensor:
    """The attention of a request's stored queries to each of its candidates, weighted as in `Kara.score`.

    candidate_blocks: [num_due, num_candidates / block_size], block ids
    returns           [num_due, num_layers, num_kv_heads, num_candidates] float32, computed in float64
    """
    keys, values = gather_window_ref(candidate_blocks, cache, torch.float64)
    logits = torch.einsum("bqhgd,bthd->bhgqt", queries.rotated_ref(), keys) * cache.head_dim**-0.5
    scores = logits.softmax(dim=-1).mean(dim=(2, 3))  # over the heads of a query group and the queries
    scores = scores + attention_floor / keys.shape[1]
    if value_norm:
        scores = scores * values.norm(dim=-1).transpose(1, 2)
    if keydiff_power > 0:
        anchor = normalize(keys, dim=-1).mean(dim=1, keepdim=True)
        cosines = cosine_similarity(keys, anchor, dim=-1).transpose(1, 2)
        scores = scores * (1 - cosines).clamp(min=0) ** keydiff_power
    return scores.float().unflatten(0, (len(queries), cache.num_layers))


def window_scores(
    queries: DueQueries,
    candidate_blocks: Tensor,
    cache: PagedCache,
    value_norm: bool = True,
    keydiff_power: float = 0.0,
    attention_floor: float = 0.0,
) -> Tensor:
    """`window_scores_ref` in Triton, one program per request, layer, KV head and tile of candidates.

    If the candidates fit in one tile, one launch reads every key and value once. Otherwise two launches precede it:
    one computes the candidates' weights, the other the softmax denominator of each query.
    """
    bank, num_due = queries.bank, len(queries)
    num_layers, head_dim = len(bank.queries), bank.head_dim
    num_candidates = candidate_blocks.shape[1] * cache.block_size
    assert bank.queries.is_contiguous() and candidate_blocks.stride(1) == 1 and head_dim == cache.head_dim
    assert num_layers == cache.num_layers and len(candidate_blocks) == num_due
    assert bank.num_kv_heads == cache.num_kv_heads
    device = bank.queries.device
    batch, num_rows = num_due * num_layers * cache.num_kv_heads, queries.num_rows
    scores = torch.empty(num_due, num_layers, cache.num_kv_heads, num_candidates, dtype=torch.float32, device=device)
    if not batch:
        return scores

    cached = cache.arguments(candidate_blocks)
    # With 8 warps, both halves of them would rotate all queries, each for its half of the keys.
    sizes = cache.sizes | dict(NUM_CANDIDATES=num_candidates, num_warps=4)
    weighting = dict(VALUE_NORM=value_norm, KEYDIFF_POWER=float(keydiff_power))
    asking = queries.sizes(cache.dot_dtype)
    block_h = asking["BLOCK_H"]
    block_t, block_q = tile_sizes(num_candidates, num_rows, 2 * block_h, cache.dtype == torch.float32)
    num_tiles = ceil_div(num_candidates, block_t)
    exponent = head_dim**-0.5 / math.log(2)  # exp2 is cheaper than exp
    asked = (*queries.arguments(), exponent)
    asking |= dict(BLOCK_T=block_t, BLOCK_Q=block_q, num_stages=3)  # faster than 2 stages on an H100
    weights = log_sums = None
    if num_tiles > 1:
        weights = torch.empty(batch, num_candidates, dtype=torch.float32, device=device)
        _weights_kernel[(batch,)](weights, *cached, BLOCK_T=64, BLOCK_H=block_h, **weighting, **sizes)
        log_sums = torch.empty(batch, num_rows, dtype=torch.float32, device=device)
        _log_sums_kernel[(batch, ceil_div(num_rows, block_q))](log_sums, *cached, *asked, **asking, **sizes)
    _scores_kernel[(batch, num_tiles)](
        scores,
        weights,
        log_sums,
        attention_floor / num_candidates,
        *cached,
        *asked,
        SEVERAL_TILES=num_tiles > 1,
        **weighting,
        **asking,
        **sizes,
    )
    return scores


def tile_sizes(num_candidates: int, num_rows: int, block_d: int, float32: bool) -> tuple[int, int]:
    """Candidates per tile, and queries per tile."""
    if float32:  # no tensor cores: small tiles, so that the operands fit in registers
        return 32, 32
    block_q = min(64, max(16, next_power_of_2(num_rows)))
    resident = max(16, next_power_of_2(num_candidates))
    if resident * block_d * 2 <= _TILE_BYTES:
        return resident, block_q
    return 64 if block_d > 128 else 128, block_q
