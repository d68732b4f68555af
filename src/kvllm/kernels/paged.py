"""The paged KV caches of all layers, in a form that a single kernel launch can read."""

# mypy: disallow-untyped-defs=False
# (kernel arguments are Triton values, which have no static type)

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether Triton runs kernels in its interpreter, on the CPU. Triton reads the same variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}
# Arguments that may start at any address. Triton compiles a kernel again for a pointer that is not a multiple of 16, as
# that of a batch's second part may be, and all requests wait for seconds.
UNALIGNED = ["candidate_blocks", "kept", "ring_starts"]
_RAW_DTYPES = {1: (torch.uint8, tl.uint8), 2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32)}


def next_power_of_2(n: int) -> int:
    """For n >= 1. `triton.next_power_of_2` is a constexpr function, which takes 20 times as long."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class PagedCache:
    """The layers' caches, and their addresses on the device. Build it with `from_layers`.

    keys, values:         one tensor per layer, [num_blocks, block_size, num_kv_heads, head_dim], all with the same
                          strides
    key_ptrs, value_ptrs: [num_layers] int64, addresses of these tensors
    k_scale, v_scale:     [num_layers] float32: stored value * scale = value; None if the cache is not quantised
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    key_ptrs: Tensor
    value_ptrs: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    alignment: int  # of every address, in bytes, at most 16

    @classmethod
    def from_layers(
        cls,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> PagedCache:
        """From the tensors that vLLM's backends see: `kv_cache.transpose(1, 2).split(head_dim, dim=-1)` per layer.

        uint8 caches are read as float8_e4m3fn, as vLLM does.
        """
        keys, values = tuple(map(_as_float, keys)), tuple(map(_as_float, values))
        first = keys[0]
        for t in (*keys, *values):
            if (t.shape, t.stride(), t.dtype) != (first.shape, first.stride(), first.dtype):
                raise ValueError(
                    f"the layers' caches must have the same layout, but differ: {tuple(t.shape)}, strides "
                    f"{t.stride()}, {t.dtype} and {tuple(first.shape)}, strides {first.stride()}, {first.dtype}."
                )
        if first.dtype not in TL_DTYPES:
            raise ValueError(f"KV cache of {first.dtype}: the kernels support {', '.join(map(str, TL_DTYPES))}.")
        if first.stride(-1) != 1:
            raise ValueError(f"KV cache with strides {first.stride()}: the head dimension must be contiguous.")
        if (first.dtype == torch.float8_e4m3fn) != (k_scale is not None and v_scale is not None):
            raise ValueError("k_scale and v_scale must be given for an fp8 cache, and only for one.")
        addresses = [[t.data_ptr() for t in layers] for layers in (keys, values)]
        key_ptrs, value_ptrs = torch.tensor(addresses, dtype=torch.int64, device=first.device)
        alignment = math.gcd(16, *addresses[0], *addresses[1])
        return cls(keys, values, key_ptrs, value_ptrs, k_scale, v_scale, alignment)

    @cached_property
    def num_layers(self) -> int:
        return len(self.keys)

    @cached_property
    def block_size(self) -> int:
        return self.keys[0].shape[1]

    @cached_property
    def num_kv_heads(self) -> int:
        return self.keys[0].shape[2]

    @cached_property
    def head_dim(self) -> int:
        return self.keys[0].shape[3]

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @cached_property
    def strides(self) -> tuple[int, int, int]:
        """Strides of blocks, tokens and heads, in elements."""
        block, token, head, _ = self.keys[0].stride()
        return block, token, head

    @property
    def tl_dtype(self) -> tl.dtype:
        return TL_DTYPES[self.dtype]

    @cached_property
    def dot_dtype(self) -> torch.dtype:
        """The dtype of the operands in kernels' matrix products."""
        if self.dtype == torch.float32 or INTERPRETED:  # the interpreter's dot treats bf16 values as integers
            return torch.float32
        return torch.float16 if self.dtype == torch.float16 else torch.bfloat16

    def arguments(self, candidate_blocks: Tensor) -> tuple[Any, ...]:
        """The kernel arguments that locate candidates, from `candidate_blocks` to `stride_kv_head`."""
        addresses = (candidate_blocks, self.key_ptrs, self.value_ptrs, self.k_scale, self.v_scale)
        return (*addresses, candidate_blocks.stride(0), *self.strides)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The kernel constants that go with `arguments`."""
        return dict(
            NUM_LAYERS=self.num_layers,
            NUM_KV_HEADS=self.num_kv_heads,
            HEAD_DIM=self.head_dim,
            BLOCK_SIZE=self.block_size,
            KV_DTYPE=self.tl_dtype,
            ALIGNMENT=self.alignment,
            HAS_SCALE=self.k_scale is not None,
        )

    @property
    def raw_tl_dtype(self) -> tl.dtype:
        """The integer type of the same width, which moves bits unchanged (a float may quiet a NaN)."""
        return _RAW_DTYPES[self.dtype.itemsize][1]

    def part(self, layers: slice) -> PagedCache:
        """The cache of some of the layers."""
        return replace(
            self,
            keys=self.keys[layers],
            values=self.values[layers],
            key_ptrs=self.key_ptrs[layers],
            value_ptrs=self.value_ptrs[layers],
            k_scale=None if self.k_scale is None else self.k_scale[layers],
            v_scale=None if self.v_scale is None else self.v_scale[layers],
        )

    def raw(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as integers of the same width; writing to them writes the cache."""
        dtype = _RAW_DTYPES[self.dtype.itemsize][0]
        return self.keys[layer].view(dtype), self.values[layer].view(dtype)


def _as_float(cache: Tensor) -> Tensor:
    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


@triton.jit
def layer_ptr(ptrs, layer, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Address of a layer's cache as a typed pointer."""
    return tl.multiple_of(tl.load(ptrs + layer).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def token_offsets(block_row, tokens, mask, stride_block, stride_token, BLOCK_SIZE: tl.constexpr):
    """Offsets (int64, in elements) of the candidates `tokens` in a layer's cache, head 0; block_row: block ids."""
    blocks = tl.load(block_row + tokens // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    return blocks * stride_block + (tokens % BLOCK_SIZE) * stride_token
