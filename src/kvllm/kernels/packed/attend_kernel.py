"""The kernels of `kvllm.kernels.packed.attend`.

A program reads packed blocks, or plain tokens, of one request and KV head, for all query heads that share it. Codes are
unpacked into the registers that the tensor cores read: with 1 or 2 warps per program, Triton uses instructions that
take both operands from registers, so unpacked data never passes through shared memory. Logits are transposed,
[tokens, queries], since a query group is small. A head's dimensions are handled in four quarters, since a word holds
one code of each.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvllm.kernels.packed.unpack import code_exponent, codes, key_exponent, narrowed, restored, unpair

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _pair_offsets(indices, stride_row, PAIRS_PER_ROW: tl.constexpr):
    """Offsets from the start of the first pair row, in pairs; rows are `stride_row` words apart."""
    return indices // PAIRS_PER_ROW * (stride_row // 2) + indices % PAIRS_PER_ROW


@triton.jit
def _request_of(tile, query_start_loc, num_reqs, BLOCK_Q: tl.constexpr):
    """The request of a tile of queries; request i starts with tile query_start_loc[i] // BLOCK_Q + i."""
    low, high = 0, num_reqs
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _parts_of(req, part_ends):
    """The index of a request's first part, and how many parts it has."""
    start = 0
    if req > 0:
        start = tl.load(part_ends + req - 1)
    return start, tl.load(part_ends + req) - start


@triton.jit
def _load_queries(query, there, words, quarter: tl.constexpr, NUM_WORDS: tl.constexpr, DTYPE: tl.constexpr):
    mask = there[None, :] & (words < NUM_WORDS)[:, None]
    loaded = tl.load(query[None, :] + quarter * NUM_WORDS + words[:, None], mask=mask).to(DTYPE)
    return tl.where(mask, loaded, 0.0)


@triton.jit
def _share_of(number, size, num_parts):
    """The range of a part among `num_parts`, whose sizes differ by at most 1."""
    return number * size // num_parts, (number + 1) * size // num_parts


# Triton compiles one variant for each PREFILL and PLAIN. It is loaded before serving, and so before CUDA graphs are
# captured.
@triton.jit(do_not_specialize=["num_reqs", "stride_lse_head", "stride_table"])
def _attend_packed_kernel(
    output, lse, part_outputs, part_lse, query, keys, values, query_start_loc, survivor_blocks, plan, programs,
    block_table, seq_lens, num_reqs,
    stride_out_token, stride_out_head, stride_lse_head, stride_query_token, stride_query_head,
    stride_block, stride_row, stride_head, stride_survivors, stride_plan, stride_table, scale,
    NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_SIZE: tl.constexpr, TOKENS_PER_ROW: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr, CODE_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_DTYPE: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr, PREFILL: tl.constexpr, PLAIN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Column n of the logits belongs to query token n // GROUP of the tile, and head n % GROUP of the query group.

    Programs start in the order of their first index, then their second. With PREFILL that is the tile; otherwise the
    head, so that idle programs come last, and those that run together read neighbouring addresses.
    """
    NUM_WORDS: tl.constexpr = HEAD_DIM // 4
    GROUP: tl.constexpr = BLOCK_N // BLOCK_Q
    head = tl.program_id(1 if PREFILL else 0)
    number, num_packed, num_tokens = 0, 1, 0
    if OVERLAP:
        gdc_launch_dependents()
    if PREFILL:
        tile = tl.program_id(0)
        req = _request_of(tile, query_start_loc, num_reqs, BLOCK_Q)
        start = tl.load(query_start_loc + req)
        token = start + (tile - (start // BLOCK_Q + req)) * BLOCK_Q
        end = tl.load(query_start_loc + req + 1)
        part = 0
    else:
        # Computed on the host: a search here would be many dependent loads.
        program = tl.load(programs + tl.program_id(1))
        if program < 0:
            if OVERLAP:  # in a dummy run all programs end here, and what follows must not overtake the store
                gdc_wait()
            return
        req, number = program & 0xFFFF, program >> 16
        num_packed = tl.load(plan + 5 * stride_plan + req)
        if (not PLAIN) & (number >= num_packed):
            return
        token = tl.load(query_start_loc + req)
        end = token + 1
        if PLAIN:
            num_tokens = tl.load(seq_lens + req)
    first_block = tl.load(plan + req)
    num_blocks = tl.load(plan + stride_plan + req) - first_block
    first, last = 0, num_blocks
    if PREFILL:
        if (token >= end) | (end - start == 1) | (num_blocks <= 0):
            return
    else:
        parts_start, num_parts = _parts_of(req, plan + 4 * stride_plan)
        part = parts_start + number
    if OVERLAP:
        gdc_wait()  # what was read so far was written before the layers ran
    n = tl.arange(0, BLOCK_N)
    own_token, own_head = token + n // GROUP, head * GROUP_SIZE + n % GROUP
    own = (own_token < end) & (n % GROUP < GROUP_SIZE)
    words = tl.arange(0, BLOCK_W)
    inside = words < NUM_WORDS
    queries = query + own_token.to(tl.int64) * stride_query_token + own_head * stride_query_head
    q0 = _load_queries(queries, own, words, 0, NUM_WORDS, DTYPE)
    q1 = _load_queries(queries, own, words, 1, NUM_WORDS, DTYPE)
    q2 = _load_queries(queries, own, words, 2, NUM_WORDS, DTYPE)
    q3 = _load_queries(queries, own, words, 3, NUM_WORDS, DTYPE)
    keys += head * stride_head
    values += head * stride_head
    if PLAIN and number >= num_packed:
        first, last = _share_of(number - num_packed, tl.cdiv(num_tokens, TILE), num_parts - num_packed)
        table = block_table + req.to(tl.int64) * stride_table
        WORDS: tl.constexpr = KV_DTYPE.primitive_bitwidth // 16  # per element
        o0, o1, o2, o3, own_lse = _attend_plain(
            q0, q1, q2, q3, keys.to(tl.pointer_type(KV_DTYPE)), values.to(tl.pointer_type(KV_DTYPE)), table,
            first, last, num_tokens, words, inside, stride_block // WORDS, stride_row // WORDS, scale,
            NUM_WORDS, BLOCK_SIZE, DTYPE, ASSEMBLY, BLOCK_W, TILE, SOFT_CAP, BLOCK_N,
        )  # fmt: skip
    else:
        if not PREFILL:
            first, last = _share_of(number, num_blocks, num_packed)
        row = tl.load(plan + 3 * stride_plan + req).to(tl.int64)
        blocks = survivor_blocks + row * stride_survivors + first_block
        o0, o1, o2, o3, own_lse = _attend_packed(
            q0, q1, q2, q3, keys, values, blocks, first, last, words, inside, stride_block, stride_row, scale,
            NUM_TOKENS, NUM_WORDS, TOKENS_PER_ROW, PAIRS_PER_ROW, CODE_ROWS, DTYPE, ASSEMBLY, BLOCK_T, BLOCK_W,
            SOFT_CAP, BLOCK_N,
        )  # fmt: skip
    mask = inside[:, None] & own[None, :]
    if PREFILL:
        others = tl.load(lse + own_head * stride_lse_head + own_token, mask=own, other=0.0) * LOG2_E
        share = (1.0 / (1.0 + tl.exp2(others - own_lse)))[None, :]
        target = (output + own_token.to(tl.int64) * stride_out_token + own_head * stride_out_head)[None, :] + words[
            :, None
        ]
        _blend(target, o0, share, mask)
        _blend(target + NUM_WORDS, o1, share, mask)
        _blend(target + 2 * NUM_WORDS, o2, share, mask)
        _blend(target + 3 * NUM_WORDS, o3, share, mask)
    else:
        own_part = part * (tl.num_programs(0) * GROUP_SIZE) + own_head
        tl.store(part_lse + own_part, own_lse, mask=own)
        target = (part_outputs + own_part.to(tl.int64) * HEAD_DIM)[None, :] + words[:, None]
        tl.store(target, o0, mask=mask)
        tl.store(target + NUM_WORDS, o1, mask=mask)
        tl.store(target + 2 * NUM_WORDS, o2, mask=mask)
        tl.store(target + 3 * NUM_WORDS, o3, mask=mask)


@triton.jit
def _attend_packed(
    q0, q1, q2, q3, keys, values, blocks, first, last, words, inside, stride_block, stride_row, scale,
    NUM_TOKENS: tl.constexpr, NUM_WORDS: tl.constexpr, TOKENS_PER_ROW: tl.constexpr, PAIRS_PER_ROW: tl.constexpr,
    CODE_ROWS: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
    SOFT_CAP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention over the packed blocks from `first` up to `last`: the quarters of the output, and the log-sum-exp."""
    tokens = tl.arange(0, BLOCK_T)
    there = tokens < NUM_TOKENS
    mask_keys, mask_values = there[:, None], there[None, :]
    if NUM_WORDS < BLOCK_W:
        mask_keys, mask_values = mask_keys & inside[None, :], mask_values & inside[:, None]
    code_offsets = tokens // TOKENS_PER_ROW * stride_row + tokens % TOKENS_PER_ROW * NUM_WORDS
    key_offsets = code_offsets[:, None] + words[None, :]
    value_offsets = code_offsets[None, :] + words[:, None]  # loaded transposed, which saves moving data in registers
    pairs_start = CODE_ROWS * stride_row
    pairs_0 = _pair_offsets(words, stride_row, PAIRS_PER_ROW)
    pairs_1 = _pair_offsets(words + NUM_WORDS, stride_row, PAIRS_PER_ROW)
    pairs_2 = _pair_offsets(words + 2 * NUM_WORDS, stride_row, PAIRS_PER_ROW)
    pairs_3 = _pair_offsets(words + 3 * NUM_WORDS, stride_row, PAIRS_PER_ROW)
    token_pairs = _pair_offsets(tokens, stride_row, PAIRS_PER_ROW)
    EVEN: tl.constexpr = code_exponent(0, DTYPE, ASSEMBLY)
    ODD: tl.constexpr = code_exponent(1, DTYPE, ASSEMBLY)
    # Of numerators, to keep their products with codes in float32's range.
    SHIFT: tl.constexpr = 100 if EVEN < -126 else 0
    scale *= 2.0 ** -key_exponent(DTYPE, ASSEMBLY)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    # Summed over a block's tokens only at the end: in the loop each token of a block has its own sum.
    total = tl.full([BLOCK_T, BLOCK_N], 0.0, tl.float32)
    rest = tl.full([BLOCK_T, BLOCK_N], 0.0, tl.float32)
    o0 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o1 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o2 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o3 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    for i in tl.range(first, last):
        base = tl.load(blocks + i).to(tl.int64) * stride_block
        key_words = tl.load(keys + base + key_offsets, mask=mask_keys, other=0)
        value_words = tl.load(values + base + value_offsets, mask=mask_values, other=0)
        key_pairs = (keys + base + pairs_start).to(tl.pointer_type(tl.int32))
        s0, z0 = unpair(tl.load(key_pairs + pairs_0, mask=inside, other=0), DTYPE, ASSEMBLY)
        s1, z1 = unpair(tl.load(key_pairs + pairs_1, mask=inside, other=0), DTYPE, ASSEMBLY)
        s2, z2 = unpair(tl.load(key_pairs + pairs_2, mask=inside, other=0), DTYPE, ASSEMBLY)
        s3, z3 = unpair(tl.load(key_pairs + pairs_3, mask=inside, other=0), DTYPE, ASSEMBLY)
        value_pairs = (values + base + pairs_start).to(tl.pointer_type(tl.int32))
        t, y = unpair(tl.load(value_pairs + token_pairs, mask=there, other=0), tl.float32, ASSEMBLY)
        k = restored(key_words, s0[None, :], z0[None, :], 0, DTYPE, ASSEMBLY)
        logits = tl.dot(k, q0, input_precision="ieee")
        k = restored(key_words, s1[None, :], z1[None, :], 1, DTYPE, ASSEMBLY)
        logits = tl.dot(k, q1, acc=logits, input_precision="ieee")
        k = restored(key_words, s2[None, :], z2[None, :], 2, DTYPE, ASSEMBLY)
        logits = tl.dot(k, q2, acc=logits, input_precision="ieee")
        k = restored(key_words, s3[None, :], z3[None, :], 3, DTYPE, ASSEMBLY)
        logits = tl.dot(k, q3, acc=logits, input_precision="ieee")
        p, highest, shrink = _numerators(logits, there, highest, scale, SOFT_CAP, SHIFT)
        weighted = narrowed(p * t[:, None], DTYPE, ASSEMBLY)
        total = total * shrink + p
        rest = rest * shrink + p * y[:, None]
        o0 = tl.dot(codes(value_words, 0, DTYPE, ASSEMBLY), weighted, acc=o0 * shrink, input_precision="ieee")
        o1 = tl.dot(codes(value_words, 1, DTYPE, ASSEMBLY), weighted, acc=o1 * shrink, input_precision="ieee")
        o2 = tl.dot(codes(value_words, 2, DTYPE, ASSEMBLY), weighted, acc=o2 * shrink, input_precision="ieee")
        o3 = tl.dot(codes(value_words, 3, DTYPE, ASSEMBLY), weighted, acc=o3 * shrink, input_precision="ieee")
    sums = tl.maximum(tl.sum(total, axis=0), 0.5)  # a part without blocks has 0, others at least 2**SHIFT
    own_rest, inverse = (tl.sum(rest, axis=0) / sums)[None, :], (2.0**SHIFT / sums)[None, :]
    o0, o2 = o0 * 2.0 ** -(EVEN + SHIFT) * inverse + own_rest, o2 * 2.0 ** -(EVEN + SHIFT) * inverse + own_rest
    o1, o3 = o1 * 2.0 ** -(ODD + SHIFT) * inverse + own_rest, o3 * 2.0 ** -(ODD + SHIFT) * inverse + own_rest
    return o0, o1, o2, o3, highest + tl.log2(sums) - SHIFT


@triton.jit
def _attend_plain(
    q0, q1, q2, q3, keys, values, table, first, last, num_tokens, words, inside, stride_block, stride_row, scale,
    NUM_WORDS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_W: tl.constexpr, TILE: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `_attend_packed`, over the plain tokens of the tiles from `first` up to `last`."""
    tile = tl.arange(0, TILE)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.full([TILE, BLOCK_N], 0.0, tl.float32)
    o0 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o1 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o2 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    o3 = tl.full([BLOCK_W, BLOCK_N], 0.0, tl.float32)
    for i in tl.range(first, last):
        tokens = i * TILE + tile
        there = tokens < num_tokens
        if BLOCK_SIZE % TILE == 0:
            base = tl.load(table + i * TILE // BLOCK_SIZE).to(tl.int64) * stride_block
            offsets = (base + i * TILE % BLOCK_SIZE * stride_row) + tile * stride_row
        else:
            blocks = tl.load(table + tokens // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
            offsets = blocks * stride_block + tokens % BLOCK_SIZE * stride_row
        k = keys + offsets[:, None] + words[None, :]
        v = values + offsets[None, :] + words[:, None]
        mask_keys, mask_values = there[:, None], there[None, :]
        if NUM_WORDS < BLOCK_W:
            mask_keys, mask_values = mask_keys & inside[None, :], mask_values & inside[:, None]
        k0 = tl.load(k, mask=mask_keys, other=0.0)
        k1 = tl.load(k + NUM_WORDS, mask=mask_keys, other=0.0)
        k2 = tl.load(k + 2 * NUM_WORDS, mask=mask_keys, other=0.0)
        k3 = tl.load(k + 3 * NUM_WORDS, mask=mask_keys, other=0.0)
        v0 = tl.load(v, mask=mask_values, other=0.0)
        v1 = tl.load(v + NUM_WORDS, mask=mask_values, other=0.0)
        v2 = tl.load(v + 2 * NUM_WORDS, mask=mask_values, other=0.0)
        v3 = tl.load(v + 3 * NUM_WORDS, mask=mask_values, other=0.0)
        logits = tl.dot(k0.to(DTYPE), q0, input_precision="ieee")
        logits = tl.dot(k1.to(DTYPE), q1, acc=logits, input_precision="ieee")
        logits = tl.dot(k2.to(DTYPE), q2, acc=logits, input_precision="ieee")
        logits = tl.dot(k3.to(DTYPE), q3, acc=logits, input_precision="ieee")
        p, highest, shrink = _numerators(logits, there, highest, scale, SOFT_CAP, 0)
        total = total * shrink + p
        weights = narrowed(p, DTYPE, ASSEMBLY)
        o0 = tl.dot(v0.to(DTYPE), weights, acc=o0 * shrink, input_precision="ieee")
        o1 = tl.dot(v1.to(DTYPE), weights, acc=o1 * shrink, input_precision="ieee")
        o2 = tl.dot(v2.to(DTYPE), weights, acc=o2 * shrink, input_precision="ieee")
        o3 = tl.dot(v3.to(DTYPE), weights, acc=o3 * shrink, input_precision="ieee")
    sums = tl.maximum(tl.sum(total, axis=0), 0.5)
    shrink = (1.0 / sums)[None, :]
    return o0 * shrink, o1 * shrink, o2 * shrink, o3 * shrink, highest + tl.log2(sums)


@triton.jit
def _numerators(logits, there, highest, scale, SOFT_CAP: tl.constexpr, SHIFT: tl.constexpr):
    """A tile's softmax numerators relative to the highest logit so far, times 2**SHIFT; that logit, for base 2; and
    what earlier sums shrink by."""
    if SOFT_CAP > 0:
        # c * tanh(x / c), for base-2 logits
        logits = SOFT_CAP - 2.0 * SOFT_CAP / (1.0 + tl.exp2(logits * (scale * (2.0 * LOG2_E / SOFT_CAP))))
        scale = 1.0
    logits = tl.where(there[:, None], logits, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(logits, axis=0) * scale)
    # One fused operation per logit, since scaling comes last.
    return (
        tl.exp2(logits * scale - (new_highest - SHIFT)[None, :]),
        new_highest,
        tl.exp2(highest - new_highest)[None, :],
    )


@triton.jit
def _blend(target, packed, share, mask):
    plain = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (plain * (1.0 - share) + packed * share).to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_lse_head"])
def _merge_packed_kernel(
    output, lse, sinks, part_outputs, part_lse, query_start_loc, plan,
    stride_out_token, stride_out_head, stride_lse_head, stride_plan,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, PLAIN: tl.constexpr, SINKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per request and head."""
    req, head = tl.program_id(0), tl.program_id(1)
    parts_start, num_parts = _parts_of(req, plan + 4 * stride_plan)
    dims = tl.arange(0, BLOCK_D)
    mask = dims < HEAD_DIM
    if PLAIN:  # a request has one token; padding, which has no parts, gets zeros
        target = output + req.to(tl.int64) * stride_out_token + head * stride_out_head + dims
        merged = tl.zeros([BLOCK_D], tl.float32)
        highest, total = -1.0e30, 0.0
        if SINKS:
            highest, total = tl.load(sinks + head).to(tl.float32) * LOG2_E, 1.0
        if OVERLAP:
            gdc_wait()
    else:
        num_parts = tl.load(plan + 5 * stride_plan + req)
        if num_parts == 0:
            return
        token = tl.load(query_start_loc + req)
        target = output + token.to(tl.int64) * stride_out_token + head * stride_out_head + dims
        merged = tl.load(target, mask=mask, other=0.0).to(tl.float32)
        highest = tl.load(lse + head * stride_lse_head + token) * LOG2_E
        total = 1.0
    for first in range(0, num_parts, PARTS):  # several at once, so that their loads overlap
        parts = first + tl.arange(0, PARTS)
        there = parts < num_parts
        parts = (parts_start + parts).to(tl.int64) * tl.num_programs(1) + head
        own_lse = tl.load(part_lse + parts, mask=there, other=float("-inf"))
        own = tl.load(
            part_outputs + parts[:, None] * HEAD_DIM + dims[None, :], mask=there[:, None] & mask[None, :], other=0.0
        )
        new_highest = tl.maximum(highest, tl.max(own_lse, axis=0))
        shrink, weights = tl.exp2(highest - new_highest), tl.exp2(own_lse - new_highest)
        merged = merged * shrink + tl.sum(own * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        highest = new_highest
    tl.store(target, (merged / tl.maximum(total, 1.0e-30)).to(output.dtype.element_ty), mask=mask)
