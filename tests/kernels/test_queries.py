"""Stored queries as compiled for a GPU; what the kernels compute with them is tested with each kernel."""

import re
from itertools import product

import triton
import triton.language as tl

from kvllm.kernels.queries import load_queries
from tests.kernels.hopper import compiled, output_of


@triton.jit
def _load_kernel(firsts, seconds, numbers, scales, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    rows, pairs = tl.arange(0, 16), tl.arange(0, 32)
    a, b, _ = load_queries(
        numbers, scales, None, None, rows, 0, 0, 0, 0, pairs, pairs + 32, 1, 1, 16, 64, 0, HALVES, DTYPE, 32
    )
    places = rows[:, None] * 32 + pairs[None, :]
    tl.store(firsts + places, a)
    tl.store(seconds + places, b)


def print_ptx():
    """Of `load_queries`, for each way to unpack and each dtype."""
    for halves, (name, dtype) in product([True, False], {"bf16": tl.bfloat16, "fp16": tl.float16}.items()):
        types = dict(firsts=f"*{name}", seconds=f"*{name}", numbers="*i8", scales="*bf16")
        print(compiled(_load_kernel, types, dict(HALVES=halves, DTYPE=dtype)).asm["ptx"])


def test_unpacking_has_no_addition_that_ptxas_miscompiles():
    """What a GPU computes depends on the shape; that the instruction is absent does not.

    ptxas 12 sometimes loses the constant of one half of a packed addition (`kvllm.kernels.queries._unpack`).
    """
    ptx = output_of("tests.kernels.test_queries")
    assert ptx.count(".entry _load_kernel") == 4
    assert not re.findall(r"add\.\w16x2.*", ptx)


if __name__ == "__main__":
    print_ptx()
