"""Decode attention over packed survivors, and over prompt and tail with them or merged with the backend's.

A program reads packed blocks, or plain ones, of one request and KV head, for all query heads that share it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor

from kvllm.kernels.overlap import can_overlap, overlapping
from kvllm.kernels.packed.attend_kernel import _attend_packed_kernel, _merge_packed_kernel
from kvllm.kernels.packed.layout import PackedLayout, as_words, read_block_ref
from kvllm.kernels.paged import INTERPRETED, TL_DTYPES, next_power_of_2
from kvllm.layout import IntArray, ceil_div

LEAST_BLOCKS = 4  # per program
SLOTS = 1056  # programs of 128 registers a thread that an H100 runs at once: 8 on each of its 132 multiprocessors
MOST_WAVES = 4  # of so many programs, approximately
OVERHEAD = 4  # blocks that a program could read in the time it needs besides
MOST_PARTS = 128  # of a request's packed, or plain, blocks: a single program per head merges them
FEW_MERGED = 1024  # heads of requests, up to which several warps merge each
TILE = 16  # plain tokens that a program reads at once
_SIZES = 2.0 ** np.arange(0, 3, 0.25)  # of parts, times the least

# The dtype of the queries in products; bfloat16 represents every fp8 value exactly.
_DOT_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.bfloat16,
}


class Batch(NamedTuple):
    """Where the survivors of a step's requests are, and how programs share the work.

    query_start_loc: [num_reqs + 1] int32, index of each request's first token in the step
    survivor_blocks: [max_num_reqs, max_blocks] int32, from `kvllm.compression.paged_store`
    plan:            [6, at least num_reqs] int32, as in `kvllm.kernels.block_tables`: the packed blocks of a request
                     are those from row PROMPT up to row PREFIX, exclusive; row 3 is its row in `survivor_blocks`; rows
                     4 and 5 come from `plan_parts`
    programs:        [at least the number of parts] int32, from `plan_parts`
    """

    query_start_loc: Tensor
    survivor_blocks: Tensor
    plan: Tensor
    programs: Tensor


class Plain(NamedTuple):
    """Where the plain tokens of a step's requests are: prompt and tail, as the attention backend sees them.

    block_table: [num_reqs, any] int32
    seq_lens:    [num_reqs] int32; 0 for padding
    """

    block_table: Tensor
    seq_lens: Tensor


def attend_plain_ref(
    query: Tensor, keys: Tensor, values: Tensor, plain: Plain, scale: float, soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of requests with one query token each over their plain tokens, and its log-sum-exp; in float64.

    Arguments as in `merge_packed_ref` and `PackedAttention.decode`; returns output and lse as the former takes them.
    """
    output = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[1::-1], -torch.inf, dtype=torch.float64, device=query.device)
    block_size = keys.shape[1]
    for i, length in enumerate(plain.seq_lens.tolist()):
        if length:
            blocks = plain.block_table[i, : ceil_div(length, block_size)].long()
            k, v = (t[blocks].flatten(0, 1)[:length].double() for t in (keys, values))
            own = query[i].double().unflatten(0, (k.shape[1], -1))
            logits = _capped(torch.einsum("hgd,thd->hgt", own, k) * scale, soft_cap)
            output[i] = torch.einsum("hgt,thd->hgd", logits.softmax(-1), v).flatten(0, 1)
            lse[:, i] = logits.logsumexp(-1).flatten()
    if sinks is not None:
        alone, lse = lse, torch.logaddexp(lse, sinks.double()[:, None])
        output *= (alone - lse).exp().T[..., None]
    return output, lse


def _capped(logits: Tensor, soft_cap: float) -> Tensor:
    return (logits / soft_cap).tanh() * soft_cap if soft_cap else logits


def merge_packed_ref(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    layout: PackedLayout,
    scale: float,
    soft_cap: float = 0.0,
) -> None:
    """Merge attention over each request's packed blocks into `output`, in place; computed in float64.

    output:       [num_tokens, num_heads, head_dim], attention over prompt and tail
    lse:          [num_heads, num_tokens] float32, the log-sum-exp of its logits
    query:        [num_tokens, num_heads, head_dim]; fp8 if the cache is fp8: packed keys include the query's scale
    keys, values: one layer's tensors of a `PagedCache`
    scale:        factor of the logits
    soft_cap:     c replaces each logit by c * tanh(logit / c); 0: no cap
    """
    starts = batch.query_start_loc.tolist()
    for i, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        first, last, row = (int(batch.plan[j, i]) for j in (0, 1, 3))
        if last <= first or end <= start:
            continue
        blocks = batch.survivor_blocks[row, first:last].long()
        k, v = (
            read_block_ref(as_words(t), blocks, layout, by_channel).flatten(0, 1).double()
            for t, by_channel in ((keys, True), (values, False))
        )
        own = query[start:end].double().unflatten(1, (k.shape[1], -1))
        logits = _capped(torch.einsum("qhgd,thd->qhgt", own, k).flatten(1, 2) * scale, soft_cap)
        probabilities = logits.softmax(-1).unflatten(1, (k.shape[1], -1))
        packed = torch.einsum("qhgt,thd->qhgd", probabilities, v).flatten(1, 2)
        share = (logits.logsumexp(-1) - lse[:, start:end].T.double()).sigmoid()[..., None]
        output[start:end] = (output[start:end].double() * (1 - share) + packed * share).to(output.dtype)


def max_parts(num_reqs: int, num_kv_heads: int) -> int:
    """The most parts that `plan_parts` can make for `num_reqs` requests."""
    return ceil_div(MOST_WAVES * SLOTS, num_kv_heads) + 2 * num_reqs


def part_counts(blocks: IntArray, num_kv_heads: int) -> IntArray:
    """Into how many parts to divide each number of blocks, so that all programs are expected to end first.

    Programs that do not run at once run in waves, and each wave takes as long as its largest program. Larger parts in a
    single wave and smaller ones in two can both be better, since rounding makes parts and waves that are not full.
    """
    longest = int(blocks.max(initial=0))
    least = max(
        LEAST_BLOCKS,
        ceil_div(int(blocks.sum()) * num_kv_heads, MOST_WAVES * SLOTS),
        ceil_div(longest, MOST_PARTS),
    )
    sizes = np.ceil(least * _SIZES).astype(np.int64)
    counts = -(-blocks // sizes[:, None])
    waves = ceil_div(counts.sum(axis=1) * num_kv_heads, SLOTS)
    return counts[np.argmin(waves * (np.minimum(sizes, longest) + OVERHEAD))]


def plan_parts(
    packed: IntArray, plain: IntArray, num_kv_heads: int, rows: npt.NDArray[np.int32], programs: npt.NDArray[np.int32]
) -> None:
    """Divide the blocks of requests into parts of about the same size; a program handles one part and KV head.

    packed, plain: [num_reqs], blocks of each kind; 0: none to read. A packed block has as many bytes as a plain one
    rows:          [2, at least num_reqs], output: cumulative number of parts, including the request's own; and how many
                   of its own are packed, which are its first
    programs:      [at least `max_parts`], output: the request + 2**16 * the part's index within the request, the
                   largest parts first, so that the last programs are short and end together; -1 after the last part
    """
    num_reqs = len(packed)
    blocks = np.empty(2 * num_reqs, np.int64)
    blocks[0::2], blocks[1::2] = packed, plain
    counts = part_counts(blocks, num_kv_heads)
    ends = np.cumsum(counts)
    rows[0, :num_reqs], rows[0, num_reqs:] = ends[1::2], ends[-1] if num_reqs else 0
    rows[1, :num_reqs], rows[1, num_reqs:] = counts[0::2], 0
    kinds = np.argsort(-blocks / np.maximum(counts, 1), kind="stable")
    own = counts[kinds]
    each = np.repeat(kinds, own)
    # The first part of each run in `each` is that of a request's packed or plain blocks; the latter follow the former.
    first = np.cumsum(own) - own - np.where(kinds % 2, counts[kinds - 1], 0)
    number = np.arange(len(each)) - np.repeat(first, own)
    programs[: len(each)] = each // 2 + (number << 16)
    programs[len(each) :] = -1


class PackedAttention:
    """Decode attention as Triton kernels, with buffers at fixed addresses.

    Requests with one query token need two launches: one that divides their blocks among programs, and one that merges
    the results. Requests with more (resumed ones that are recomputed) need a single other launch, which `prefill`
    enables.
    """

    def __init__(
        self, layout: PackedLayout, num_heads: int, num_kv_heads: int, max_num_reqs: int, device: Any,
        soft_cap: float = 0.0,
    ) -> None:  # fmt: skip
        self.layout, self.soft_cap = layout, soft_cap
        self.overlap = can_overlap(torch.device(device))
        self.num_heads, self.num_kv_heads, self.group_size = num_heads, num_kv_heads, num_heads // num_kv_heads
        most = max_parts(max_num_reqs, num_kv_heads) * num_heads
        self.outputs = torch.empty(most, layout.head_dim, dtype=torch.float32, device=device)
        self.lse = torch.empty(most, dtype=torch.float32, device=device)

    def decode(
        self, output: Tensor, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, plain: Plain, scale: float,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Attention of requests with one query token each, over their plain and their packed tokens.

        Arguments as in `merge_packed_ref`, but not fp8, and:
        output: overwritten; zeros for padding, which has no parts
        sinks:  [num_heads], a logit of each head that only adds to the softmax's denominator

        With `overlap` it starts early if the kernel before it permits.
        """
        self.attend(query, keys, values, batch, scale, plain)
        self._merge(output, None, batch, sinks)

    def merge(
        self, output: Tensor, lse: Tensor, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float,
        prefill: bool = False,
    ) -> None:  # fmt: skip
        """As `merge_packed_ref`."""
        self.attend(query, keys, values, batch, scale)
        self.finish(output, lse, query, keys, values, batch, scale, prefill)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, plain: Plain | None = None
    ) -> None:
        """The part of `merge`, or with `plain` of `decode`, before parts are merged; its results go to the buffers."""
        block_n = max(8, next_power_of_2(self.group_size))
        # With 128 registers a multiprocessor runs eight programs at once; larger heads need more registers.
        limit = {"maxnreg": 128} if block_n == 8 and self.layout.head_dim <= 128 else {}
        num_parts = max_parts(len(batch.query_start_loc) - 1, self.num_kv_heads)
        self._launch(
            num_parts, None, None, query, keys, values, batch, scale, plain,
            PREFILL=False, BLOCK_Q=1, BLOCK_N=block_n, num_stages=3, **limit,
        )  # fmt: skip

    def finish(
        self, output: Tensor, lse: Tensor, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float,
        prefill: bool = False,
    ) -> None:  # fmt: skip
        """The rest of `merge`, once the backend's output is there."""
        self._merge(output, lse, batch)
        if prefill:
            block_n = max(32, next_power_of_2(self.group_size))
            block_q = block_n // next_power_of_2(self.group_size)
            self._launch(
                ceil_div(query.shape[0], block_q) + len(batch.query_start_loc) - 1, output, lse, query, keys, values,
                batch, scale, None, PREFILL=True, BLOCK_Q=block_q, BLOCK_N=block_n, num_stages=2,
            )  # fmt: skip

    def _merge(self, output: Tensor, lse: Tensor | None, batch: Batch, sinks: Tensor | None = None) -> None:
        assert output.stride(2) == 1 and (lse is None or lse.stride(1) == 1)
        num_reqs, head_dim = len(batch.query_start_loc) - 1, self.layout.head_dim
        # A few requests have many parts each, and leave the GPU empty: then several warps read many at once.
        few = num_reqs * self.num_heads <= FEW_MERGED
        _merge_packed_kernel[(num_reqs, self.num_heads)](
            output, lse, sinks, self.outputs, self.lse, batch.query_start_loc, batch.plan, *output.stride()[:2],
            0 if lse is None else lse.stride(0), batch.plan.stride(0), HEAD_DIM=head_dim,
            BLOCK_D=next_power_of_2(head_dim), PARTS=32 if few else 4, PLAIN=lse is None, SINKS=sinks is not None,
            num_warps=4 if few else 1, **overlapping(self.overlap and lse is None),
        )  # fmt: skip

    def _launch(
        self, size: int, output: Tensor | None, lse: Tensor | None, query: Tensor, keys: Tensor, values: Tensor,
        batch: Batch, scale: float, plain: Plain | None, **options: Any,
    ) -> None:  # fmt: skip
        layout = self.layout
        assert query.stride(2) == 1
        kv_dtype = TL_DTYPES[keys.dtype]
        keys, values = as_words(keys), as_words(values)
        dtype = _DOT_DTYPES[query.dtype]
        unassembled = INTERPRETED or dtype == tl.float32
        strides = (0, 0, 0) if output is None or lse is None else (*output.stride()[:2], lse.stride(0))
        tables = (None, None) if plain is None else plain
        grid = (size, self.num_kv_heads) if options["PREFILL"] else (self.num_kv_heads, size)
        _attend_packed_kernel[grid](
            output, lse, self.outputs, self.lse, query, keys, values, *batch, *tables, len(batch.query_start_loc) - 1,
            *strides, *query.stride()[:2], *keys.stride()[:3], batch.survivor_blocks.stride(0), batch.plan.stride(0),
            0 if plain is None else plain.block_table.stride(0),
            scale / math.log(2),
            NUM_TOKENS=layout.num_tokens,
            HEAD_DIM=layout.head_dim,
            GROUP_SIZE=self.group_size,
            TOKENS_PER_ROW=layout.tokens_per_row,
            PAIRS_PER_ROW=layout.pairs_per_row,
            CODE_ROWS=layout.code_rows,
            BLOCK_SIZE=keys.shape[1],
            KV_DTYPE=kv_dtype,
            DTYPE=tl.float32 if unassembled else dtype,
            ASSEMBLY=not unassembled,
            SOFT_CAP=self.soft_cap * math.log2(math.e),
            PLAIN=plain is not None,
            **overlapping(self.overlap and plain is not None),
            BLOCK_T=max(16, next_power_of_2(layout.num_tokens)),
            BLOCK_W=max(16, next_power_of_2(layout.num_words)),
            TILE=TILE,
            **{"num_warps": 2, **options},
        )  # fmt: skip
