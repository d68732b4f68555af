"""Stored queries as compiled for a GPU; what the kernels compute with them is tested with each kernel."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvllm.kernels.queries import load_queries

ROOT = Path(__file__).parents[2]  # tests.conftest would turn on the interpreter in the process that compiles


@triton.jit
def _load_kernel(firsts, seconds, numbers, scales, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    rows, pairs = tl.arange(0, 16), tl.arange(0, 32)
    a, b, _ = load_queries(
        numbers, scales, None, None, rows, 0, 0, 0, 0, pairs, pairs + 32, 1, 1, 16, 64, 0, HALVES, DTYPE, 32
    )
    places = rows[:, None] * 32 + pairs[None, :]
    tl.store(firsts + places, a)
    tl.store(seconds + places, b)


def compile_for_hopper():
    """Print the PTX of `load_queries`, for each way to unpack and each dtype. Needs no GPU, but a compiled Triton."""
    for halves, (name, dtype) in product([True, False], {"bf16": tl.bfloat16, "fp16": tl.float16}.items()):
        types = dict(firsts=f"*{name}", seconds=f"*{name}", numbers="*i8", scales="*bf16")
        types |= dict(HALVES="constexpr", DTYPE="constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
        source = ASTSource(_load_kernel, types, dict(HALVES=halves, DTYPE=dtype), aligned)
        print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


def test_unpacking_has_no_addition_that_ptxas_miscompiles():
    """What a GPU computes depends on the shape; that the instruction is absent does not.

    ptxas 12 sometimes loses the constant of one half of a packed addition (`kvllm.kernels.queries._unpack`).
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_queries"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".entry _load_kernel") == 4
    assert not re.findall(r"add\.\w16x2.*", done.stdout)


if __name__ == "__main__":
    compile_for_hopper()
