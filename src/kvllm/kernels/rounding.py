"""Rounding as PyTorch does it, half to even, on GPUs and in Triton's interpreter."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x):
    """Round float32 below 2^22 to integers. Triton has no rounding that its interpreter supports."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def rounded_to_bfloat16(x):
    """Round finite float32 to bfloat16's precision; bitwise, since the interpreter's cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + (bits >> 16 & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)
