"""Dense copies of the candidates for methods without fused kernels, and writing new keys and values back."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvllm.kernels.paged import UNALIGNED, PagedCache, layer_ptr, next_power_of_2, token_offsets

FP8_MAX = 448.0  # largest finite float8_e4m3fn
_TILE = 64 * 256  # elements that a program holds at once; more would not fit in the registers of its four warps


def gather_window_ref(candidate_blocks: Tensor, cache: PagedCache, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the candidates, dequantised, in `dtype`.

    candidate_blocks: [num_due, num_candidates / block_size], block ids
    returns           keys and values, [num_due * num_layers, num_candidates, num_kv_heads, head_dim] each
    """
    return (
        _gather_ref(candidate_blocks, cache.keys, cache.k_scale, dtype),
        _gather_ref(candidate_blocks, cache.values, cache.v_scale, dtype),
    )


def _gather_ref(blocks: Tensor, layers: tuple[Tensor, ...], scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    # Indexed as bytes, since not every device can index fp8.
    raw = torch.stack([t.view(torch.uint8)[blocks.long()].flatten(1, 2) for t in layers], dim=1)
    window = raw.view(layers[0].dtype)
    if scale is not None:
        window = window.to(torch.promote_types(dtype, torch.float32)) * scale[:, None, None, None].to(window.device)
    return window.flatten(0, 1).to(dtype)


def gather_window(candidate_blocks: Tensor, cache: PagedCache, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`gather_window_ref` as a Triton kernel, one program per request, layer and tile of rows."""
    num_due, num_candidates = len(candidate_blocks), candidate_blocks.shape[1] * cache.block_size
    shape = (num_due * cache.num_layers, num_candidates, cache.num_kv_heads, cache.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=candidate_blocks.device) for _ in range(2))
    _launch(keys, values, candidate_blocks, cache, scatter=False)
    return keys, values


def scatter_window_ref(keys: Tensor, values: Tensor, candidate_blocks: Tensor, cache: PagedCache) -> None:
    """Write new keys and values to the first `num_kept` candidates, quantised like the cache.

    keys, values:     [num_due * num_layers, num_kept, num_kv_heads, head_dim]
    candidate_blocks: [num_due, num_candidates / block_size], block ids
    """
    scatter_rows_ref(keys, candidate_blocks, cache.keys, cache.k_scale)
    scatter_rows_ref(values, candidate_blocks, cache.values, cache.v_scale)


def scatter_rows_ref(rows: Tensor, candidate_blocks: Tensor, layers: tuple[Tensor, ...], scale: Tensor | None) -> None:
    """`scatter_window_ref` for keys or values alone; layers: their caches."""
    tokens, block_size = torch.arange(rows.shape[1], device=rows.device), layers[0].shape[1]
    blocks = candidate_blocks[:, tokens // block_size].long()
    rows = rows.unflatten(0, (len(candidate_blocks), len(layers)))
    for layer, old in enumerate(layers):
        new = rows[:, layer]
        if scale is not None:
            new = (new.float() / scale[layer]).clamp(-FP8_MAX, FP8_MAX)
        # Indexed as bytes, since not every device can index fp8.
        old.view(torch.uint8)[blocks, tokens % block_size] = new.to(old.dtype).contiguous().view(torch.uint8)


def scatter_window(keys: Tensor, values: Tensor, candidate_blocks: Tensor, cache: PagedCache) -> None:
    """`scatter_window_ref` as a Triton kernel, one program per request, layer and tile of rows."""
    _launch(keys.contiguous(), values.contiguous(), candidate_blocks, cache, scatter=True)


def _launch(keys: Tensor, values: Tensor, candidate_blocks: Tensor, cache: PagedCache, scatter: bool) -> None:
    assert candidate_blocks.stride(1) == 1
    batch, num_tokens = keys.shape[:2]
    num_rows, block_d = num_tokens * cache.num_kv_heads, next_power_of_2(cache.head_dim)
    block_r = min(64, max(1, _TILE // block_d))
    if not batch:
        return
    _copy_window_kernel[(batch, triton.cdiv(num_rows, block_r))](
        keys,
        values,
        candidate_blocks,
        cache.key_ptrs,
        cache.value_ptrs,
        cache.k_scale,
        cache.v_scale,
        candidate_blocks.stride(0),
        *cache.strides,
        NUM_LAYERS=cache.num_layers,
        NUM_KV_HEADS=cache.num_kv_heads,
        NUM_ROWS=num_rows,
        HEAD_DIM=cache.head_dim,
        BLOCK_SIZE=cache.block_size,
        KV_DTYPE=cache.tl_dtype,
        ALIGNMENT=cache.alignment,
        HAS_SCALE=cache.k_scale is not None,
        SCATTER=scatter,
        FP8_MAX=FP8_MAX,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )


@triton.jit
def _copy_tile(
    dense, ptrs, scale, offsets, dims, batch, rows, mask, layer,
    NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
    HAS_SCALE: tl.constexpr, SCATTER: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    paged = layer_ptr(ptrs, layer, KV_DTYPE, ALIGNMENT) + offsets[:, None] + dims[None, :]
    dense += (batch * NUM_ROWS + rows)[:, None] * HEAD_DIM + dims[None, :]
    if SCATTER:
        x = tl.load(dense, mask=mask)
        if HAS_SCALE:
            x = tl.div_rn(x.to(tl.float32), tl.load(scale + layer))  # rounded as PyTorch does
            x = tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX)
        tl.store(paged, x.to(KV_DTYPE), mask=mask)
    else:
        x = tl.load(paged, mask=mask)
        if HAS_SCALE:
            x = x.to(tl.float32) * tl.load(scale + layer)
        tl.store(dense, x.to(dense.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _copy_window_kernel(
    keys, values, candidate_blocks, key_ptrs, value_ptrs, k_scale, v_scale,
    stride_candidates, stride_kv_block, stride_kv_token, stride_kv_head,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SCATTER: tl.constexpr, FP8_MAX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row r is token r // NUM_KV_HEADS, head r % NUM_KV_HEADS."""
    batch = tl.program_id(0).to(tl.int64)
    layer = batch % NUM_LAYERS
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    valid = rows < NUM_ROWS
    block_row = candidate_blocks + batch // NUM_LAYERS * stride_candidates
    offsets = token_offsets(block_row, rows // NUM_KV_HEADS, valid, stride_kv_block, stride_kv_token, BLOCK_SIZE)
    offsets += (rows % NUM_KV_HEADS) * stride_kv_head
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    _copy_tile(
        keys, key_ptrs, k_scale, offsets, dims, batch, rows, mask, layer,
        NUM_ROWS, HEAD_DIM, KV_DTYPE, ALIGNMENT, HAS_SCALE, SCATTER, FP8_MAX,
    )  # fmt: skip
    _copy_tile(
        values, value_ptrs, v_scale, offsets, dims, batch, rows, mask, layer,
        NUM_ROWS, HEAD_DIM, KV_DTYPE, ALIGNMENT, HAS_SCALE, SCATTER, FP8_MAX,
    )  # fmt: skip
