"""The state that compression keeps in a worker, and its work at the start of a step. Does not import vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvllm.compression.compressor import Compressor, Fused, Pack, most_survivors
from kvllm.compression.paged_store import PagedCandidates, PagedStore
from kvllm.compression.query_bank import QueryBank
from kvllm.compression.rounding import Rounding
from kvllm.compression.rows import NUM_PLANNED, PREFIX, PROMPT, REMOVED, TAIL, Due, RequestRows
from kvllm.compression.stopwatch import Stopwatch
from kvllm.config import KvConfig
from kvllm.layout import Geometry, IntArray, Shape, ceil_div
from kvllm.methods import make_methods
from kvllm.methods.base import LayerShape, Method
from kvllm.methods.rope import Rope

assert (PROMPT, PREFIX, TAIL) == tuple(range(NUM_PLANNED))  # the plan's first rows; the request's own row follows
PLAN_ROWS = NUM_PLANNED + 1


@dataclass(frozen=True)
class Layers:
    """The compressed attention layers, which all have the same shape.

    numbers: their indices in the model
    dtype:   the model's
    """

    numbers: Sequence[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


class WorkerState:
    """The stored queries, the rows of the running requests, and the compressors of their cache, one for each method.

    Created with the model, so that vLLM's memory profiling counts it before sizing the KV pool. `attach` follows once
    the cache exists.
    """

    def __init__(
        self,
        config: KvConfig,
        layers: Layers,
        rope: Rope | None,
        max_num_reqs: int,
        max_num_tokens: int,
        device: torch.device | str = "cpu",
        fused: bool = False,
        packed_rows: int = 0,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """
        fused:       whether `attach` will get fused kernels for all methods; these do not need the survivors' positions
        packed_rows: further rows of the plan, for the kernels that attend to packed survivors
        stopwatch:   shared with another state, to add up the seconds of both
        """
        self.config = config
        self.methods = make_methods(config)
        shape = LayerShape(1 + max(layers.numbers), layers.num_heads, layers.num_kv_heads, layers.head_dim)
        for method in self.methods.values():
            method.check_layers(shape)
        self.layers = layers
        self.rope = rope
        self.rows = RequestRows(config, max_num_reqs)
        self.bank = QueryBank.allocate(
            len(layers.numbers), max_num_reqs, config.num_queries, layers.num_heads, layers.num_kv_heads,
            layers.head_dim, config.query_stride, layers.dtype, device,
        )  # fmt: skip
        self.stopwatch = stopwatch or Stopwatch(device)
        self.positions: Tensor | None = None
        if (most := most_survivors(config)) and not fused:
            self.positions = torch.zeros(
                max_num_reqs, len(layers.numbers), layers.num_kv_heads, most, dtype=torch.int32, device=device
            )
        self.store: PagedStore | None = None
        self.compressors: dict[str, Compressor] = {}
        # The step's input on the device: the plan of `join_segments` and the bank's codes, adjacent so that one copy
        # sends both.
        self.plan_stride = ceil_div(max_num_reqs, 4) * 4  # every row starts at a multiple of 16 bytes
        self.plan_rows = PLAN_ROWS + packed_rows
        self.plan_size = self.plan_rows * self.plan_stride
        self.step = torch.zeros(self.plan_size + max_num_tokens, dtype=torch.int32, device=device)
        self.plan = self.step[: self.plan_size].view(self.plan_rows, -1)
        self.codes = self.step[self.plan_size :]
        self.codes.fill_(-1)

    def rope_for(self, method: Method) -> Rope | None:
        """What the method and its kernels get: nothing, if it does not look ahead."""
        return self.rope if method.uses_rope else None

    def attach(
        self,
        store: PagedStore,
        fused: Mapping[str, Fused | None] | None = None,
        pack: Pack | None = None,
        cache_dtype: str = "auto",
    ) -> None:
        """Compress in this store from now on.

        fused:       the kernels of each method
        cache_dtype: vLLM's --kv-cache-dtype
        """
        self.store = store
        numbers = torch.tensor(self.layers.numbers, device=self.bank.queries.device)
        rounding = Rounding.from_config(self.config, store.block_size, self.layers.head_dim, cache_dtype)
        for name, method in self.methods.items():
            self.compressors[name] = Compressor(
                self.config, method, store, numbers, self.bank.shifts, self.rope_for(method), self.positions,
                (fused or {}).get(name), rounding=rounding, pack=pack,
            )  # fmt: skip

    def warm_up(self, geometries: Iterable[Geometry]) -> None:
        """Compile the kernels for every shape that an event can have, so that no step has to."""
        assert self.store is not None
        done: set[Shape] = set()
        for geometry in geometries:
            for shape, event in geometry.shapes().items():
                if shape in done:
                    continue
                done.add(shape)
                # All candidates are in the null block, which is never read.
                num_blocks = shape.num_candidates // geometry.block_size
                blocks = torch.zeros(1, num_blocks, dtype=torch.int32, device=self.step.device)
                candidates = PagedCandidates(blocks, self.store.to_device([0]))
                for compressor in self.compressors.values():
                    compressor.compress_batch([Due(0, 0, geometry, 1, event)], shape, candidates)

    def begin_step(
        self, rows: IntArray, num_computed_tokens: IntArray, names: Sequence[str], block_table: Tensor
    ) -> IntArray:
        """Compress what is due before the step; returns the REMOVED column of `RequestRows`, [num_reqs] int64.

        rows, num_computed_tokens: [num_reqs]; names: request ids; block_table: [num_reqs, any], by logical index
        """
        assert self.store is not None
        if due := self.rows.begin_step(rows, num_computed_tokens, names):
            by_method: dict[str, list[Due]] = {}
            for each in due:
                by_method.setdefault(self.rows.methods[each.row], []).append(each)
            with self.stopwatch.running():
                self.store.begin_step(block_table)
                for method, its_own in by_method.items():
                    self.compressors[method].compress(its_own)
                self.store.settle()
        return self.rows.columns[REMOVED, rows]

    def write_plan(
        self,
        host: npt.NDArray[np.int32],
        rows: IntArray,
        num_computed_tokens: IntArray,
        counts: IntArray,
    ) -> npt.NDArray[np.int32]:
        """Write the step's plan and codes into `host`, to be copied to `step`; call it after `begin_step`.

        host:   [plan_size + the step's tokens, padding included]
        counts: [num_reqs], tokens of each request in this step
        returns the plan, [plan_rows, plan_stride], a view of `host`
        """
        plan, codes = host[: self.plan_size].reshape(self.plan_rows, -1), host[self.plan_size :]
        plan[:NUM_PLANNED, : len(rows)] = self.rows.columns[:NUM_PLANNED, rows]
        plan[NUM_PLANNED, : len(rows)] = rows
        plan[TAIL, len(rows) :] = 0  # 0: no events, so the kernels read no other column
        codes[:] = self.rows.query_codes(rows, num_computed_tokens, counts, self.bank.period, len(codes))
        return plan
