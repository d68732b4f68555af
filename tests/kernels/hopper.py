"""Compiles kernels for an H100, which needs no GPU but a Triton that is not its interpreter: a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parents[2]


def compiled(kernel, types, constants, unaligned=(), **options):
    """The compiled kernel; its `asm` has "ptx" and "sass".

    types:     of the arguments that are not constants, such as "*bf16" or "i32"
    unaligned: those that need not be multiples of 16
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name not in unaligned and types[name] != "fp32"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def output_of(module):
    """What `python -m module` prints without the interpreter, which tests.conftest would turn on in this process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
