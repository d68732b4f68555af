"""Dequantizes four-bit codes inside a kernel."""

# mypy: disallow-untyped-defs=False
# (kernel arguments are Triton values, which have no static type)

from __future__ import annotations

import triton
import triton.language as tl

# As the lowest bits of a 16-bit float a code is a tiny (subnormal) number, exactly proportional to it. So one operation
# unpacks two codes, and tensor cores multiply them as they are; other factors make up for their size. Codes of odd
# quarters stay four bits higher, which makes them 16 times as large.
_LOW = tl.constexpr("and.b32 $0, $1, 0x000f000f;")
_HIGH = tl.constexpr("and.b32 $0, $1, 0x00f000f0;")
_FMA_BF16 = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")
# 1024 + code, from a code in the low bits of 1024's mantissa, less 1024: tiny numbers would need too large scales here.
_RESTORED_F16 = tl.constexpr(
    "{ .reg .b32 magic, one, bias; mov.b32 magic, 0x64006400; mov.b32 one, 0x3c003c00; mov.b32 bias, 0xe400e400;"
    " lop3.b32 $0, $1, 0x000f000f, magic, 0xea;"
    " fma.rn.f16x2 $0, $0, one, bias; fma.rn.f16x2 $0, $0, $2, $3; }"
)


@triton.constexpr_function
def _shift_right(bits):
    return f"shr.b32 $0, $1, {bits};"


@triton.jit
def _shifted(words, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Words shifted right by BITS; their upper bits may come from a neighbouring word."""
    if BITS == 0:
        return words
    elif not ASSEMBLY:
        return words >> BITS
    else:
        SHIFT: tl.constexpr = _shift_right(BITS)
        return tl.inline_asm_elementwise(SHIFT, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def codes(words, QUARTER: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A quarter's code of each word in DTYPE, times 2**`code_exponent`."""
    if not ASSEMBLY:
        return (_shifted(words, 4 * QUARTER, False) & 15).to(DTYPE)
    else:
        MASK: tl.constexpr = _HIGH if QUARTER % 2 else _LOW
        words = _shifted(words, QUARTER // 2 * 8, True)
        bits = tl.inline_asm_elementwise(MASK, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
        return bits.to(DTYPE, bitcast=True)


@triton.constexpr_function
def code_exponent(quarter, dtype, assembly):
    """Of the number that code 1 becomes: the smallest of the dtype, or in odd quarters 16 times as much."""
    if not assembly:
        return 0
    return (-133 if dtype == tl.bfloat16 else -24) + 4 * (quarter % 2)


@triton.constexpr_function
def key_exponent(dtype, assembly):
    """`restored` gives keys times two to this power: halfway between scales that overflow, and keys that underflow."""
    return -60 if assembly and dtype == tl.bfloat16 else 0


@triton.jit
def _power(EXPONENT: tl.constexpr):
    """2**EXPONENT in bfloat16. As a factor of a bfloat16 number Triton would round it to six decimals."""
    return tl.full([], 2.0**EXPONENT, tl.float32).to(tl.bfloat16)


@triton.jit
def restored(words, scale, lowest, QUARTER: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """(lowest + code * scale) * 2**`key_exponent` for a quarter's code of each word, in DTYPE.

    scale, lowest: in DTYPE, must broadcast
    """
    if not ASSEMBLY:
        return codes(words, QUARTER, DTYPE, False) * scale + lowest
    elif DTYPE == tl.bfloat16:
        OF_KEYS: tl.constexpr = key_exponent(DTYPE, ASSEMBLY)
        OF_SCALES: tl.constexpr = OF_KEYS - code_exponent(QUARTER, DTYPE, ASSEMBLY)
        operands = [codes(words, QUARTER, DTYPE, True), scale * _power(OF_SCALES), lowest * _power(OF_KEYS)]
        return tl.inline_asm_elementwise(_FMA_BF16, "=r,r,r,r", operands, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        operands = [_shifted(words, 4 * QUARTER, True), scale, lowest]
        return tl.inline_asm_elementwise(_RESTORED_F16, "=&r,r,r,r", operands, dtype=tl.float16, is_pure=True, pack=2)


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
