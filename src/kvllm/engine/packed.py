"""Packed survivors on GPUs: attention over them, together with prompt and tail.

In a step that computes one token for each request, one kernel reads them all. In other steps, and with an fp8 cache,
the backend's attention reads prompt and tail, and the two outputs are merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvllm import support
from kvllm.compression.paged_store import PagedCandidates
from kvllm.compression.rounding import Rounding
from kvllm.compression.rows import PREFIX, PROMPT
from kvllm.compression.worker import PLAN_ROWS
from kvllm.engine.log_sum_exp import LOG_SUM_EXP, PATCH
from kvllm.errors import UsageError
from kvllm.kernels.packed.attend import Batch, PackedAttention, Plain, max_parts, plan_parts
from kvllm.kernels.packed.layout import PackedLayout
from kvllm.kernels.packed.pack import pack
from kvllm.kernels.paged import PagedCache
from kvllm.layout import IntArray, ceil_div


class Order(Enum):
    """When a layer's attention over packed survivors runs."""

    ALONE = auto()  # one kernel reads prompt and tail as well
    BESIDE = auto()  # at the same time as the backend's attention
    BEFORE = auto()  # before the backend's attention


class Step(NamedTuple):
    """A layer's attention over packed survivors in a step; packed: the arguments of `PackedAttention.attend`."""

    packed: tuple[Tensor, Tensor, Tensor, Batch, float]
    order: Order


class PackedSurvivors:
    """Merges attention over packed survivors into the layers' attention, and packs the survivors of events.

    dtype: the model's
    Raises UsageError if a layer's attention cannot be merged.
    """

    def __init__(self, layers: list[Any], rounding: Rounding, dtype: torch.dtype) -> None:
        for layer in layers:
            for reason in support.packed_reasons(layer):
                raise UsageError(f"KvLLM does not support survivor_bits={rounding.bits} with {reason}.")
        self.layers = layers
        self.rounding = rounding
        self.dtype = dtype
        self.attention: PackedAttention | None = None
        # Whether the step computes several tokens of a request with packed survivors. True in dummy runs, too.
        self.resumed = False
        # Whether one kernel computes the attention that follows the present layer's write to the cache.
        self.follows = False
        PATCH.apply()
        for index, layer in enumerate(layers):
            layer.impl.forward = self._merging(layer.impl.forward, index)

    def attach(self, cache: PagedCache, survivor_blocks: Tensor, plan: Tensor) -> None:
        """Read packed survivors from this cache from now on; `survivor_blocks` and `plan` as in `Batch`."""
        first = self.layers[0]
        self.cache, self.survivor_blocks, self.plan = cache, survivor_blocks, plan
        self.programs = plan[PLAN_ROWS + 2 :].view(-1)
        attention = PackedAttention(
            PackedLayout.of(cache, self.rounding),
            first.num_heads,
            first.num_kv_heads,
            len(survivor_blocks),
            plan.device,
            getattr(first.impl, "logits_soft_cap", None) or 0.0,
        )
        self.stream = torch.cuda.Stream(plan.device) if plan.is_cuda else None
        self.idle()
        for num_reqs in {1, len(survivor_blocks)}:
            self._compile(attention, num_reqs)
        self.attention = attention

    @property
    def overlap(self) -> bool:
        """Whether that kernel may start before the write has ended."""
        return self.attention is not None and self.attention.overlap

    def _compile(self, attention: PackedAttention, num_reqs: int) -> None:
        """Compile what steps of so many requests launch, so that the first of them does not wait for it."""
        first, device = self.layers[0], self.plan.device
        output = torch.zeros(num_reqs, first.num_heads, first.head_size, dtype=self.dtype, device=device)
        quantized = self.cache.dtype.itemsize == 1 and first.impl.supports_quant_query_input
        query = output.to(self.cache.dtype) if quantized else output
        lse = torch.zeros(first.num_heads, num_reqs, device=device)
        starts = torch.zeros(num_reqs + 1, dtype=torch.int32, device=device)
        empty = Batch(starts, self.survivor_blocks, self.plan, self.programs)
        pairs = self.cache.keys[0], self.cache.values[0]
        attention.merge(output, lse, query, *pairs, empty, 1.0, prefill=True)
        if self._plain_too:
            plain = Plain(self.survivor_blocks, starts)
            attention.decode(output, query, *pairs, empty, plain, 1.0, self._sinks(first))

    @staticmethod
    def plan_rows(max_num_reqs: int, num_kv_heads: int) -> int:
        """Rows that `write_plan` adds to a step's plan: two of per-request entries, and those of the parts."""
        return 2 + ceil_div(max_parts(max_num_reqs, num_kv_heads), max_num_reqs)

    def pack(self, candidates: PagedCandidates, num_kept: int) -> None:
        pack(candidates.blocks, num_kept, self.cache, self.rounding)

    def write_plan(self, plan: npt.NDArray[np.int32], counts: IntArray, lengths: IntArray) -> None:
        """Complete the plan of a step on the host.

        counts:  [num_reqs], tokens of each request in this step
        lengths: [num_reqs], plain tokens of each request, with this step's
        """
        num_reqs = len(counts)
        packed = plan[PREFIX, :num_reqs].astype(np.int64) - plan[PROMPT, :num_reqs]
        self.resumed = bool((packed[counts > 1] > 0).any())
        plain = np.zeros_like(packed)
        if self._plain_too and (counts == 1).all():
            plain = ceil_div(lengths, self.cache.block_size)
        packed = np.where(counts == 1, packed, 0)
        programs = plan[PLAN_ROWS + 2 :].reshape(-1)
        plan_parts(packed, plain, self.layers[0].num_kv_heads, plan[PLAN_ROWS : PLAN_ROWS + 2], programs)

    def idle(self) -> None:
        """Prepare a dummy run."""
        self.plan.zero_()
        self.programs.fill_(-1)
        self.resumed = True  # so that the run before a graph capture loads this kernel as well

    @property
    def _plain_too(self) -> bool:
        """Whether our kernel reads plain tokens as well, in a step that computes one token for each request.

        Not in an fp8 cache: FlashAttention multiplies its keys and values without converting them.
        """
        return self.cache.dtype.itemsize > 1

    def start_first(self) -> None:
        """Start attention over packed survivors before the layers' writes to the cache, on which it does not depend.

        Call it once these writes are part of the layers' `forward`.
        """
        for index, layer in enumerate(self.layers):
            layer.impl.forward = self._starting(layer.impl.forward, index)

    def _starting(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        def starting_forward(
            layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, *args: Any,
            **kwargs: Any,
        ) -> Any:  # fmt: skip
            if attn_metadata is not None and self.attention is not None:
                step = self._step(index, query, attn_metadata)
                self.follows = step.order is Order.ALONE and self.overlap
                if step.order is Order.BESIDE:
                    # On a second stream: neither our kernels nor the backend's fill the GPU until they end.
                    with self._second_stream():
                        self.attention.attend(*step.packed)
            return forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

        return starting_forward

    def _second_stream(self) -> AbstractContextManager[Any]:
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def _step(self, index: int, query: Tensor, attn_metadata: Any) -> Step:
        """What a layer's attention does in this step."""
        batch = Batch(attn_metadata.query_start_loc, self.survivor_blocks, self.plan, self.programs)
        tokens = query[: attn_metadata.num_actual_tokens]
        scale = self.layers[index].impl.scale
        packed = (tokens, self.cache.keys[index], self.cache.values[index], batch, scale)
        if attn_metadata.max_query_len > 1:
            return Step(packed, Order.BEFORE)
        return Step(packed, Order.ALONE if self._plain_too else Order.BESIDE)

    def _merging(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        def merging_forward(
            layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
            *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if attn_metadata is None or self.attention is None:
                return forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            step = self._step(index, query, attn_metadata)
            own_output = output[: attn_metadata.num_actual_tokens]
            if step.order is Order.ALONE:
                plain, sinks = Plain(attn_metadata.block_table, attn_metadata.seq_lens), self._sinks(self.layers[index])
                tokens, keys, values, batch, scale = step.packed
                self.attention.decode(own_output, tokens, keys, values, batch, plain, scale, sinks)
                return output
            if step.order is Order.BEFORE:  # launches each kernel individually: synchronizing streams would cost more
                self.attention.attend(*step.packed)
            LOG_SUM_EXP.wanted = True
            try:
                result = forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            finally:
                LOG_SUM_EXP.wanted = False
            if step.order is Order.BESIDE and self.stream is not None:
                torch.cuda.current_stream().wait_stream(self.stream)
            prefill = self.resumed and step.order is Order.BEFORE
            self.attention.finish(own_output, LOG_SUM_EXP.take(), *step.packed, prefill)
            return result

        return merging_forward

    @staticmethod
    def _sinks(layer: Any) -> Tensor | None:
        sinks: Tensor | None = getattr(layer.impl, "sinks", None)
        return sinks
