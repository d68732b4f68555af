"""Dequantizes four-bit codes inside a kernel."""

# mypy: disallow-untyped-defs=False
# (kernel arguments are Triton values, which have no static type)

from __future__ import annotations

import triton
import triton.language as tl

# Setting the low bits of a number's mantissa to a code adds the code to the number: 128 + code in bfloat16, 1024 + code
# in float16. Two codes of one quarter are converted at once.


def _assembly(dtype: str, restored: bool) -> str:
    numbers = {"bf16": (0x4300, 0xC300, 0x3F80), "f16": (0x6400, 0xE400, 0x3C00)}[dtype]
    magic, bias, one = (f"0x{n:04x}{n:04x}" for n in numbers)
    code = f"mov.b32 magic, {magic}; lop3.b32 $0, $1, 0x000f000f, magic, 0xea;"  # ($1 & 0x000f000f) | magic
    if restored:
        code += f"mov.b32 one, {one}; mov.b32 bias, {bias}; fma.rn.{dtype}x2 $0, $0, one, bias;"
        code += f"fma.rn.{dtype}x2 $0, $0, $2, $3;"
    return "{ .reg .b32 magic, one, bias; " + code + " }"


_BF16_CODES = tl.constexpr(_assembly("bf16", restored=False))
_BF16_RESTORED = tl.constexpr(_assembly("bf16", restored=True))
_F16_CODES = tl.constexpr(_assembly("f16", restored=False))
_F16_RESTORED = tl.constexpr(_assembly("f16", restored=True))


@triton.jit
def _quarter(words, QUARTER: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Words whose lowest four bits are a quarter's codes; the upper bits may come from a neighbouring word."""
    if QUARTER == 0:
        return words
    elif not ASSEMBLY:
        return words >> 4 * QUARTER
    elif QUARTER == 1:
        return tl.inline_asm_elementwise("shr.b32 $0, $1, 4;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
    elif QUARTER == 2:
        return tl.inline_asm_elementwise("shr.b32 $0, $1, 8;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise("shr.b32 $0, $1, 12;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def codes(words, QUARTER: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A quarter's code of each word, plus `code_bias`, in DTYPE."""
    shifted = _quarter(words, QUARTER, ASSEMBLY)
    if not ASSEMBLY:
        return (shifted & 15).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(_BF16_CODES, "=r,r", [shifted], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(_F16_CODES, "=r,r", [shifted], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def restored(words, scale, lowest, QUARTER: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """lowest + code * scale for a quarter's code of each word, in DTYPE; scale, lowest: in DTYPE, must broadcast."""
    if not ASSEMBLY:
        return codes(words, QUARTER, DTYPE, False) * scale + lowest
    elif DTYPE == tl.bfloat16:
        operands = [_quarter(words, QUARTER, ASSEMBLY), scale, lowest]
        return tl.inline_asm_elementwise(_BF16_RESTORED, "=&r,r,r,r", operands, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        operands = [_quarter(words, QUARTER, ASSEMBLY), scale, lowest]
        return tl.inline_asm_elementwise(_F16_RESTORED, "=&r,r,r,r", operands, dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def unpair(pair, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Scale and lowest value, from 32 bits that hold both in bfloat16."""
    if ASSEMBLY and DTYPE == tl.bfloat16:  # permutes the bytes of two pairs, without a conversion
        return (
            tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [pair], dtype=tl.bfloat16, is_pure=True, pack=2
            ),
            tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [pair], dtype=tl.bfloat16, is_pure=True, pack=2
            ),
        )
    scale = (pair << 16).to(tl.float32, bitcast=True)
    lowest = (pair & -65536).to(tl.float32, bitcast=True)
    return scale.to(DTYPE), lowest.to(DTYPE)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Convert float32 to DTYPE, two elements at once."""
    if ASSEMBLY and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return x.to(DTYPE)


@triton.jit
def code_bias(DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    if not ASSEMBLY:
        return 0.0
    elif DTYPE == tl.bfloat16:
        return 128.0
    else:
        return 1024.0
