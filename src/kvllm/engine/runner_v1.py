"""Compression for vLLM's V1 model runner, which the CPU platform uses."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvllm.compression.rows import RunningRequests
from kvllm.compression.staged_queries import StagedQueries, StepQueries
from kvllm.compression.stopwatch import Stopwatch
from kvllm.compression.worker import Layers, WorkerState
from kvllm.config import KvConfig
from kvllm.engine.attention import (
    capture_queries,
    compressed_layers,
    in_kernel_blocks,
    in_part,
    kernel_block_backend,
    shortening_backend,
)
from kvllm.engine.cache_groups import compressed_block_size, compressed_groups
from kvllm.engine.rope import rope_for
from kvllm.engine.settings import Geometries, kv_config, request_method
from kvllm.engine.steady import JoinedTables, SteadyBatch
from kvllm.engine.store_cpu import CpuStore
from kvllm.layout import IntArray

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers

MOST_STEPS_AHEAD = 64  # for which the queries to store are worked out at once


def compressor_v1(runner: Any) -> CompressorV1 | CompressorsV1:
    """The compressor, or compressors, of vLLM's V1 runner, whose model must be loaded."""
    config = kv_config(runner.vllm_config)
    assert config is not None
    made = [CompressorV1(runner, config)]
    made += [CompressorV1(runner, config, part, made[0].state.stopwatch) for part in range(1, len(config.parts))]
    return made[0] if len(made) == 1 else CompressorsV1(made)


class CompressorsV1:
    """One compressor for each group of layers with its own ratio (`KvConfig.parts`)."""

    def __init__(self, parts: list[CompressorV1]) -> None:
        self.parts = parts
        self.state = parts[0].state  # its stopwatch is shared by all

    def release(self, scheduler_output: SchedulerOutput) -> None:
        for part in self.parts:
            part.release(scheduler_output)

    def skip_step(self) -> None:
        for part in self.parts:
            part.skip_step()

    def begin_step(self, num_scheduled_tokens: dict[str, int]) -> None:
        for part in self.parts:
            part.begin_step(num_scheduled_tokens)


class CompressorV1:
    """Compresses due windows before a step's attention, and joins the two segments that attention reads.

    For all compressed layers, or for one part of them. `runner` is vLLM's V1 runner with its model loaded. Requests are
    identified by id, since the runner moves its rows.
    """

    part = 0
    steady: SteadyBatch | None = None
    joined: JoinedTables | None = None  # of a steady batch with events
    num_removed: IntArray | None = None  # tokens that attention skips in the current step; None if there are none

    def __init__(self, runner: Any, whole_config: KvConfig, part: int = 0, stopwatch: Stopwatch | None = None) -> None:
        self.runner = runner
        self.part = part
        self.num_parts = len(whole_config.parts)
        self.config = config = whole_config.parts[part]
        self.geometries = Geometries.of_engine(runner.vllm_config)
        named_layers = {
            name: layer
            for name, layer in compressed_layers(runner.vllm_config).items()
            if in_part(whole_config, part, name)
        }
        self.layers = list(named_layers.values())
        layer, numbers = self.layers[0], [extract_layer_index(name) for name in named_layers]
        shape = Layers(numbers, layer.num_heads, layer.num_kv_heads, layer.head_size, runner.model_config.dtype)
        rope = rope_for(config, runner.model, self.layers, runner.model_config, runner.device)
        self.state = WorkerState(config, shape, rope, runner.max_num_reqs, runner.max_num_tokens, stopwatch=stopwatch)
        self.state.attach(
            CpuStore(config, self.state.bank, self.geometries.block_size, runner.max_model_len, layers=self.layers)
        )
        self.running = RunningRequests(runner.max_num_reqs)
        self.staged = StagedQueries(self.state.bank, shape.dtype)
        capture_queries(self.layers, self.staged.capture, "cpu")
        for each in self.layers:
            each.attn_backend = shortening_backend(each.attn_backend, self._shorten)
            if runner.model_config.is_hybrid:
                each.attn_backend = kernel_block_backend(each.attn_backend, self.geometries.block_size)
        logger.info("KvLLM: %s, query bank of %.0f MiB", config, self.state.bank.num_bytes / 2**20)

    def release(self, scheduler_output: SchedulerOutput) -> None:
        """Release the rows of requests that no longer run: called in every step, before the runner updates its state.

        In the same step a preempted request may resume, and the id of a finished one may be reused.
        """
        for gone in (scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids):
            if gone:
                self.running.release(gone)
                self.steady = None

    def skip_step(self) -> None:
        """Prepare a dummy run."""
        self.staged.skip_step()
        self.num_removed = None

    def begin_step(self, num_scheduled_tokens: dict[str, int]) -> None:
        """Compress what is due and plan the step: called after slot mappings, before attention is planned."""
        self.skip_step()
        batch = self.runner.input_batch
        req_ids = batch.req_ids[: batch.num_reqs]
        computed = batch.num_computed_tokens_cpu[: len(req_ids)]
        counts = [num_scheduled_tokens[req_id] for req_id in req_ids]
        queries = None
        if self.steady is not None:
            queries = self.steady.next_step(req_ids, computed.tolist(), sum(counts))
        if queries is None:
            queries = self._begin_other_step(req_ids, computed.astype(np.int64), np.array(counts, np.int64))
        assert self.steady is not None
        self.num_removed = self.steady.num_removed
        self.staged.begin_step(queries)

    def _begin_other_step(self, req_ids: list[str], computed: IntArray, counts: IntArray) -> StepQueries:
        """Begin a step of other requests than the last one's, with several tokens of one, or with an event."""
        self.staged.flush()  # events read the bank, and rows may have a new request
        self.joined = None
        rows = np.array([self._row_of(req_id) for req_id in req_ids], np.int64)
        batch, state = self.runner.input_batch, self.state
        table = torch.from_numpy(batch.block_table[self.group].get_numpy_array()[: len(req_ids)])
        removed = state.begin_step(rows, computed, req_ids, in_kernel_blocks(table, self.blocks_per_block))
        size = state.plan_size + int(counts.sum())
        state.write_plan(state.step.numpy()[:size], rows, computed, counts)
        codes = state.step.numpy()[state.plan_size : size].astype(np.int64)
        after = computed + counts
        steps = min(int((state.rows.next_due(rows) - after).min()), MOST_STEPS_AHEAD)
        coming = self.staged.steps(state.rows.codes_ahead(rows, after, max(steps, 0), state.bank.period))
        self.steady = SteadyBatch(req_ids, removed if removed.any() else None, after.tolist(), coming[::-1])
        return self.staged.steps(codes[None])[0]

    @cached_property
    def group(self) -> int:
        """The index of the compressed KV cache group; known once vLLM has made its groups."""
        groups = compressed_groups(self.runner.kv_cache_config, self.geometries.block_size, self.num_parts)
        return groups[self.part]

    @cached_property
    def blocks_per_block(self) -> int:
        """Kernel blocks per allocator block."""
        assert self.state.store is not None
        block_size = self.geometries.block_size
        size = compressed_block_size(self.runner.kv_cache_config, block_size, self.num_parts)
        self.state.store.allocator_block_size = size
        return size // block_size

    def _row_of(self, req_id: str) -> int:
        if req_id not in self.running:
            request = self.runner.requests[req_id]
            row = self.running.admit(req_id)
            geometry = self.geometries.of(request.sampling_params)
            own = None if geometry is None else geometry.groups[self.part]
            method = request_method(self.config, request.sampling_params)
            self.state.rows.set(row, own, request.num_prompt_tokens, method)
        return self.running[req_id]

    def _shorten(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """`metadata` with physical lengths and block table; slot mapping and positions stay logical."""
        if self.num_removed is None:
            return metadata
        store = self.state.store
        assert store is not None
        if self.joined is None or not self.joined.extend(metadata.block_table_tensor, metadata.seq_lens):
            self.joined = JoinedTables(
                metadata.block_table_tensor, metadata.seq_lens, self.num_removed, store.survivor_blocks,
                self.state.plan, store.block_size,
            )  # fmt: skip
        seq_lens = self.joined.seq_lens
        return replace(
            metadata,
            seq_lens=seq_lens,
            block_table_tensor=self.joined.block_table,
            max_seq_len=int(seq_lens.numpy().max()),
            seq_lens_cpu_upper_bound=None if metadata.seq_lens_cpu_upper_bound is None else seq_lens,
        )
