"""Attention over packed survivors as compiled for a GPU; what it computes is tested in `test_attend`."""

import re
from collections import Counter

import torch
import triton.language as tl

from kvllm.kernels.packed.attend_kernel import _attend_packed_kernel, _merge_packed_kernel
from tests.kernels.hopper import compiled, output_of

POINTERS = dict(
    output="*bf16", part_outputs="*fp32", part_lse="*fp32", query="*bf16", keys="*i16", values="*i16",
    query_start_loc="*i32", survivor_blocks="*i32", plan="*i32", programs="*i32", block_table="*i32", seq_lens="*i32",
)  # fmt: skip
SIZES = (
    "num_reqs", "stride_out_token", "stride_out_head", "stride_query_token", "stride_query_head", "stride_block",
    "stride_row", "stride_head", "stride_survivors", "stride_plan", "stride_table",
)  # fmt: skip
TYPES = POINTERS | dict.fromkeys(SIZES, "i32") | {"scale": "fp32"}
UNALIGNED = ("num_reqs", "stride_survivors", "stride_plan", "stride_table")
# An 8B model: heads of 128 dimensions in groups of four, blocks of 16 tokens.
ATTEND = dict(
    output=None, lse=None, stride_out_token=0, stride_out_head=0, stride_lse_head=0, NUM_TOKENS=56, HEAD_DIM=128,
    GROUP_SIZE=4, TOKENS_PER_ROW=4, PAIRS_PER_ROW=64, CODE_ROWS=14, BLOCK_SIZE=16, KV_DTYPE=tl.bfloat16,
    DTYPE=tl.bfloat16, ASSEMBLY=True, SOFT_CAP=0.0, PREFILL=False, PLAIN=True, BLOCK_Q=1, BLOCK_N=8, BLOCK_T=64,
    BLOCK_W=32, TILE=16, OVERLAP=True,
)  # fmt: skip
MERGE = dict(
    lse=None, sinks=None, stride_lse_head=0, HEAD_DIM=128, BLOCK_D=128, PARTS=4, PLAIN=True, SINKS=False, OVERLAP=True
)


def pair_of_bfloat16(number):
    return 0x10001 * int(torch.tensor(number).bfloat16().view(torch.int16))


def print_ptx():
    attend = compiled(
        _attend_packed_kernel, TYPES, ATTEND, UNALIGNED, num_warps=2, num_stages=3, maxnreg=128, launch_pdl=True
    )
    plain_float32 = dict(ASSEMBLY=False, DTYPE=tl.float32, KV_DTYPE=tl.float32, HEAD_DIM=64, BLOCK_W=16)
    compiled(_attend_packed_kernel, TYPES | {"query": "*fp32"}, ATTEND | plain_float32, UNALIGNED, num_warps=2)
    merge = compiled(_merge_packed_kernel, TYPES, MERGE, UNALIGNED, num_warps=1, launch_pdl=True)
    print(attend.asm["ptx"], merge.asm["ptx"], sep="of the merging kernel:\n")


def test_compiled_for_an_h100():
    attend, merge = output_of("tests.kernels.packed.test_compiled").split("of the merging kernel:\n")
    # Keys and scales are multiplied by exact powers of two. Triton writes a bfloat16 constant with six decimals.
    moved = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", attend))
    factors = [int(moved[register]) for register in re.findall(r"mul\.bf16x2\s+%r\d+, %r\d+, (%r\d+);", attend)]
    powers = [-60, 133 - 60, 129 - 60]  # of keys, and of scales of codes of 2**-133, and 2**-129 in odd quarters
    assert Counter(factors) == Counter(
        {pair_of_bfloat16(2.0**power): number for power, number in zip(powers, (16, 8, 8), strict=True)}
    )
    # Programs with work and without both wait for the kernel before them; only attention lets the next one start early.
    assert [text.count("griddepcontrol.wait") for text in (attend, merge)] == [2, 1]
    assert [text.count("griddepcontrol.launch_dependents") for text in (attend, merge)] == [1, 0]


if __name__ == "__main__":
    print_ptx()
