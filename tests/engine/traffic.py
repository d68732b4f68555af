"""An engine without a model: vLLM's schedulers and runners with ours, over a cache of labels instead of numbers.

What is real: scheduler, KV manager and block pool, how each of vLLM's model runners keeps its requests, and all of our
own code but the kernels, in whose place their PyTorch references stand. What is not: the forward pass. Where a model
would write a token's query, key and value, this writes who the token belongs to and its position, so every read can be
compared with what `kvllm.reference` has of the request.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker import gpu_model_runner as v1
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_input_batch import InputBatch

from kvllm.compression.compressor import Compressor, most_survivors
from kvllm.compression.paged_store import PagedCandidates
from kvllm.compression.query_ring import query_shifts
from kvllm.compression.rows import EVENTS, Due, RunningRequests
from kvllm.compression.staged_queries import StagedQueries
from kvllm.compression.store import ALL_LAYERS
from kvllm.compression.worker import Layers, WorkerState
from kvllm.config import KvConfig
from kvllm.engine.runner_v1 import CompressorV1
from kvllm.engine.runner_v2 import KvModelState, Part
from kvllm.engine.scheduler import KvAsyncScheduler, KvScheduler
from kvllm.engine.settings import Geometries
from kvllm.engine.spec import KvSpec
from kvllm.engine.store_gpu import GpuStore
from kvllm.kernels.paged import PagedCache
from kvllm.layout import Geometry, GroupedGeometry, ceil_div
from kvllm.methods.base import Kept, Method, Window
from kvllm.reference.cache import DenseStore, LayerCache
from tests.engine.conftest import attention_tables
from tests.engine.host_memory import HostMemory, transfer_config

BLOCK_SIZE, MAX_LEN, NUM_HEADS = 4, 256, 2  # two heads, one KV head: the heads' queries are of different tokens
PROMPT_KINDS = 2  # prompts of one kind begin alike, so they share blocks
FIRST_OUTPUT = 10_000  # request n answers with this token plus n, over and over: no two share a generated block


class LabelMethod(Method):
    """Keeps tokens by their positions, and checks that candidates and queries are those of one request's event.

    factor: methods with different ones keep different tokens
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def score(self, window: Window) -> Tensor:
        positions = window.positions  # [batch, num_kv_heads, num_tokens]
        assert torch.equal(window.keys[..., 1].transpose(1, 2).long(), positions)
        assert torch.equal(window.keys, window.values)
        queries = window.grouped_queries()  # [batch, num_kv_heads, group_size, num_queries, 2]
        owners, asking = window.keys[..., 0].flatten(1), queries[..., 0].flatten(1)
        owner = asking[:, :1]
        assert bool((asking == owner).all()) and bool(((owners == owner) | (owners < 0)).all())
        # From the end the text is dense: the newest candidate's position says where the queries stand.
        expected = window.head_query_positions + positions[..., -1:, None] + 1 - window.num_tokens
        assert torch.equal(queries[..., 1].long(), expected)
        return (positions * self.factor % 31).float()

    def compress_prompt(self, window: Window, num_kept: int) -> Kept:
        return self.compress(window, num_kept)


def label_methods(config: KvConfig) -> dict[str, Method]:
    """In the place of each method that requests may choose, one that keeps other tokens."""
    return {name: LabelMethod(factor) for name, factor in zip(config.methods, (7919, 6007), strict=True)}


@dataclass(frozen=True)
class Arrival:
    prompt_kind: int
    num_prompt_tokens: int
    max_tokens: int
    ratio: float | None
    method: str | None
    priority: int


class Text:
    """What the reference has of a request, and the labels of its tokens. A preempted request gets a new one."""

    def __init__(self, owner: int, arrival: Arrival, config: KvConfig, geometry: Geometry | None) -> None:
        method = label_methods(config)[arrival.method or config.method]
        self.owner, self.arrival, self.config, self.geometry = owner, arrival, config, geometry
        self.num_events = 0
        self.layer = LayerCache(config.query_span)
        self.compressor = Compressor(
            config, method, DenseStore(config, [self.layer]), torch.zeros(1, dtype=torch.int64),
            torch.from_numpy(query_shifts(config.query_stride, NUM_HEADS)), None,
            torch.zeros(1, 1, 1, most_survivors(config), dtype=torch.int32),
        )  # fmt: skip

    def labels(self, first: int, end: int) -> Tensor:
        """[end - first, 1, 2]: owner and position; all prompts of a kind have the same labels, since they share."""
        positions = torch.arange(first, end)
        prompt = positions < self.arrival.num_prompt_tokens
        owners = torch.where(prompt, -1 - self.arrival.prompt_kind, self.owner)
        return torch.stack([owners, positions], dim=1)[:, None].float()

    def queries(self, first: int, end: int) -> Tensor:
        """[end - first, NUM_HEADS, 2]: not shared between requests."""
        labels = torch.stack([torch.full((end - first,), self.owner), torch.arange(first, end)], dim=1)
        return labels[:, None].expand(-1, NUM_HEADS, -1).float()

    def begin_step(self, num_computed: int) -> None:
        """Run the events that are due before a step that starts with `num_computed` tokens."""
        if not hasattr(self.layer, "keys"):
            self.append(num_computed)  # found in the prefix cache
        assert self.layer.num_appended == num_computed
        geometry, prompt = self.geometry, self.arrival.num_prompt_tokens
        if geometry is not None and geometry.num_events(prompt, num_computed) > self.num_events:
            self.compressor.compress([Due(0, 0, geometry, prompt, self.num_events)])
            self.num_events += 1

    def append(self, count: int) -> None:
        first = self.layer.num_appended
        labels = self.labels(first, first + count)
        self.layer.append(self.queries(first, first + count), labels, labels)


@dataclass
class Step:
    """A worker's results for one step, per request in batch order."""

    req_ids: list[str]
    counts: list[int]  # tokens scheduled
    computed: list[int]
    num_events: list[int | None]  # None where the request is not compressed
    block_tables: Tensor  # [num_reqs, max_blocks], as attention gets them
    seq_lens: Tensor  # [num_reqs], the same
    logical_tables: Tensor  # [num_reqs, max_blocks], by which new tokens are written


class LabelStore(GpuStore):
    """The store of the V2 runner, here for both runners."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.written: list[int] = []  # blocks that the present step's compressions wrote

    def write(self, candidates: PagedCandidates, kept: Kept, layers: slice = ALL_LAYERS) -> None:
        super().write(candidates, kept, layers)
        self.written += candidates.blocks[:, : kept.indices.shape[-1] // BLOCK_SIZE].flatten().tolist()


def label_state(config: KvConfig, cache: PagedCache, max_num_seqs: int) -> tuple[WorkerState, LabelStore]:
    """One layer, one KV head."""
    state = WorkerState(config, Layers([0], NUM_HEADS, 1, 2, torch.float32), None, max_num_seqs, MAX_LEN)
    state.methods = label_methods(config)
    store = LabelStore(config, state.bank, BLOCK_SIZE, MAX_LEN, cache=cache, dtype=torch.float32)
    state.attach(store)
    return state, store


class SymbolicCompressor(CompressorV1):
    """Compression for the V1 runner, over a cache of labels."""

    def __init__(self, runner: Any, config: KvConfig, cache: PagedCache, max_num_seqs: int) -> None:
        self.runner, self.config, self.geometries = runner, config, Geometries(config, BLOCK_SIZE)
        self.num_parts = 1
        self.state, self.store = label_state(config, cache, max_num_seqs)
        self.staged = StagedQueries(self.state.bank, torch.float32)
        self.running = RunningRequests(max_num_seqs)
        self.group, self.blocks_per_block = 0, 1
        self.skip_step()


class WorkerV1:
    """The request bookkeeping of vLLM's V1 runner, with our compressor."""

    def __init__(self, config: KvConfig, cache: PagedCache, max_num_seqs: int, is_async: bool) -> None:
        runner: Any = object.__new__(v1.GPUModelRunner)
        runner.requests, runner.num_prompt_logprobs, runner.encoder_cache = {}, {}, {}
        runner.late_interaction_runner = SimpleNamespace(
            on_requests_finished=lambda ids: None, register_request=lambda req_id, params: None
        )
        runner.is_pooling_model = runner.uses_mrope = runner.use_async_spec_decode = False
        runner.speculative_config, runner.use_async_scheduling = None, is_async
        runner.kv_cache_config, runner.reorder_batch_threshold = SimpleNamespace(kv_cache_groups=[None]), None
        runner.device = torch.device("cpu")
        runner.input_batch = InputBatch(
            max_num_seqs, MAX_LEN, MAX_LEN, torch.device("cpu"), 10, [BLOCK_SIZE], [MAX_LEN // BLOCK_SIZE]
        )
        self.runner = runner
        runner.kv_compressor = self.compressor = SymbolicCompressor(runner, config, cache, max_num_seqs)

    def execute(self, scheduled: SchedulerOutput) -> Step | None:
        self.runner._update_states(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return None
        batch, compressor = self.runner.input_batch, self.compressor
        req_ids = batch.req_ids[: batch.num_reqs]
        assert set(req_ids) == set(scheduled.num_scheduled_tokens)
        counts = [scheduled.num_scheduled_tokens[r] for r in req_ids]
        computed = batch.num_computed_tokens_cpu[: len(req_ids)].tolist()
        compressor.store.written.clear()
        compressor.begin_step(scheduled.num_scheduled_tokens)
        tables = torch.from_numpy(batch.block_table[0].get_numpy_array()[: len(req_ids)].copy())
        attended, seq_lens = attention_tables(compressor, tables, computed, counts)
        rows = compressor.state.rows
        held = [compressor.running[r] for r in req_ids]
        events = [int(rows.columns[EVENTS, row]) if rows.geometries[row] is not None else None for row in held]
        return Step(req_ids, counts, computed, events, attended, seq_lens, tables)

    @property
    def rows(self) -> dict[str, int]:
        """The row of every compressed request that has one."""
        running, geometries = self.compressor.running, self.compressor.state.rows.geometries
        return {req_id: running[req_id] for req_id in running if geometries[running[req_id]] is not None}

    @property
    def written(self) -> list[int]:
        return self.compressor.store.written

    def store_queries(self, queries: Tensor) -> None:
        self.compressor.staged.capture(0, queries)


class Tables:
    """The part of the V2 runner's block tables that its bookkeeping calls."""

    def __init__(self, max_num_seqs: int) -> None:
        self.rows = torch.zeros(max_num_seqs, MAX_LEN // BLOCK_SIZE, dtype=torch.int32)
        self.lengths = [0] * max_num_seqs

    def append_block_ids(self, row: int, block_ids: tuple[list[int], ...], overwrite: bool) -> None:
        (new,) = block_ids
        start = 0 if overwrite else self.lengths[row]
        self.lengths[row] = start + len(new)
        self.rows[row, start : start + len(new)] = torch.tensor(new, dtype=torch.int32)


class SymbolicPart(Part):
    """Layers that the V2 runner compresses together, here one, over a cache of labels."""

    def __init__(self, config: KvConfig, cache: PagedCache, max_num_seqs: int) -> None:
        self.config, self.cache, self.device, self.dtype = config, cache, torch.device("cpu"), torch.float32
        self.compression, self.store = label_state(config, cache, max_num_seqs)
        self.seq_lens = torch.zeros(max_num_seqs, dtype=torch.int32)


class SymbolicState(KvModelState):
    """Compression for the V2 runner, over a cache of labels."""

    def __init__(self, config: KvConfig, cache: PagedCache, max_num_seqs: int) -> None:
        self.config, self.geometries = config, Geometries(config, BLOCK_SIZE)
        self.max_num_reqs, self.max_num_tokens = max_num_seqs, MAX_LEN
        self.rope_state = self.prompt_embeds_state = None
        self.part = SymbolicPart(config, cache, max_num_seqs)
        self.parts = [self.part]


class WorkerV2:
    """The request bookkeeping of vLLM's V2 runner, with our model state."""

    def __init__(self, config: KvConfig, cache: PagedCache, max_num_seqs: int, is_async: bool) -> None:
        runner: Any = object.__new__(v2.GPUModelRunner)
        runner.pooling_runner = runner.pp_handler = runner.encoder_cache = runner.prompt_logprobs_worker = None
        runner.adaptive_verification = runner.sampler = None
        runner.is_last_pp_rank = False
        runner.lora_state = SimpleNamespace(add_request=lambda *args: None, remove_request=lambda req_id: None)
        runner.req_states = RequestState(max_num_seqs, MAX_LEN, MAX_LEN, 0, 10, torch.device("cpu"))
        runner.req_states.apply_staged_writes = lambda: None  # to the GPU
        runner.block_tables = Tables(max_num_seqs)
        runner.model_state = self.state = SymbolicState(config, cache, max_num_seqs)
        self.runner = runner

    def execute(self, scheduled: SchedulerOutput) -> Step | None:
        runner, state = self.runner, self.state
        runner.finish_requests(scheduled)
        runner.add_requests(scheduled)
        runner.update_requests(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return None
        req_ids, counts = list(scheduled.num_scheduled_tokens), list(scheduled.num_scheduled_tokens.values())
        rows = np.array([runner.req_states.req_id_to_index[r] for r in req_ids])
        computed = runner.req_states.num_computed_tokens_np[rows].astype(np.int64)
        seq_lens = torch.from_numpy(computed + np.array(counts)).int()
        logical = runner.block_tables.rows[rows]
        tables = logical.clone()
        self.written.clear()
        batch: Any = SimpleNamespace(
            num_reqs=len(req_ids), req_ids=req_ids, idx_mapping_np=rows, num_computed_tokens_np=computed,
            num_scheduled_tokens=np.array(counts), num_tokens=sum(counts), num_tokens_after_padding=sum(counts),
            seq_lens=seq_lens,
        )  # fmt: skip
        state.preprocess_state(batch, (tables,), None, seq_lens)
        known = state.compression.rows
        events = [int(known.columns[EVENTS, row]) if known.geometries[row] is not None else None for row in rows]
        lengths = state.part.seq_lens[: len(req_ids)].clone()
        return Step(req_ids, counts, computed.tolist(), events, tables, lengths, logical)

    @property
    def rows(self) -> dict[str, int]:
        rows = self.runner.req_states.req_id_to_index
        return {r: row for r, row in rows.items() if self.state.compression.rows.geometries[row] is not None}

    @property
    def written(self) -> list[int]:
        return self.state.part.store.written

    def store_queries(self, queries: Tensor) -> None:
        self.state.part._store(0, queries, queries, queries)


@dataclass
class Engine:
    """One scheduler and one worker, which check one another in every step."""

    vllm_config: Any  # a copy of its own
    worker_class: type[WorkerV1] | type[WorkerV2]
    config: KvConfig
    num_blocks: int
    max_num_seqs: int
    is_async: bool
    counts: Counter[str]
    host_chunks: int = 0  # of prompts that host memory holds; 0: none are offloaded
    blocks_per_chunk: int = 1
    texts: dict[str, Text] = field(default_factory=dict)
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    in_flight: list[tuple[SchedulerOutput, ModelRunnerOutput]] = field(default_factory=list)
    num_texts: int = 0

    def __post_init__(self) -> None:
        self.vllm_config.additional_config = {"kvllm": self.config.to_dict()}
        if self.host_chunks:
            self.vllm_config.kv_transfer_config = transfer_config(self.host_chunks, self.blocks_per_chunk)
        spec = KvSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=2, dtype=torch.float32)
        self.scheduler = (KvAsyncScheduler if self.is_async else KvScheduler)(
            vllm_config=self.vllm_config,
            kv_cache_config=KVCacheConfig(self.num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(self.vllm_config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        self.scheduler.use_v2_model_runner = self.worker_class is WorkerV2
        keys, values = (torch.full((self.num_blocks, BLOCK_SIZE, 1, 2), torch.nan) for _ in range(2))
        self.cache = PagedCache.from_layers([keys], [values])
        self.host = HostMemory(keys, values, self.blocks_per_chunk, seed=self.num_blocks) if self.host_chunks else None
        self.worker = self.worker_class(self.config, self.cache, self.max_num_seqs, self.is_async)
        self.geometries = Geometries(self.config, BLOCK_SIZE)
        self.hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(self.hash_fn)
        self.num_arrived = 0

    # ------------------------------------------------------------------ what may happen

    def arrive(self, arrival: Arrival) -> None:
        """Queue a request, unless it could not finish even alone, as the engine checks on arrival."""
        chosen = {"kv_retention_ratio": arrival.ratio, "kv_method": arrival.method}
        extra = {name: value for name, value in chosen.items() if value is not None}
        params = SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True, extra_args=extra or None)
        total, geometry = arrival.num_prompt_tokens + arrival.max_tokens, self.geometries.of(params)
        needed = ceil_div(total, BLOCK_SIZE)
        if geometry is not None:
            needed = geometry.peak_blocks(arrival.num_prompt_tokens, total)
        if needed > self.num_blocks - 1:
            return
        name, self.num_arrived = str(self.num_arrived), self.num_arrived + 1
        prompt = [arrival.prompt_kind * MAX_LEN + i for i in range(arrival.num_prompt_tokens)]
        hasher = get_request_block_hasher(BLOCK_SIZE, self.hash_fn)
        self.arrivals[name] = arrival
        self.counts["requests"] += 1
        self.scheduler.add_request(
            Request(name, prompt, params, None, block_hasher=hasher, priority=arrival.priority, arrival_time=0.0)
        )

    def abort(self, choice: int) -> None:
        if self.scheduler.requests:
            name = sorted(self.scheduler.requests)[choice % len(self.scheduler.requests)]
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self.counts["aborts"] += 1

    def preempt_all(self) -> None:
        """As when the prefix cache is emptied while requests run: they may be resumed in the very next step."""
        try:
            self.scheduler.reset_prefix_cache(reset_running_requests=True)
        except RuntimeError as e:  # raised once all are preempted: a prompt is being loaded, or blocks are kept
            assert self.host is not None and "waiting for remote KV transfer" in str(e)
        self.counts["resets"] += 1

    def step(self, throttle_prefills: bool = False) -> None:
        scheduler, counts = self.scheduler, self.counts
        scheduled = scheduler.schedule(throttle_prefills)
        counts["steps"] += 1
        counts["preempted"] += len(scheduled.preempted_req_ids or ())
        self._begin_texts(scheduled)
        step = self.worker.execute(scheduled)  # its events come before the copies of vLLM's runner
        if self.host is not None:
            self.host.before_forward(scheduled.kv_connector_metadata)
        if step is not None:
            self._check_step(step)
            self._forward(step)
        self._check_rows()
        names = list(scheduled.num_scheduled_tokens)
        tokens = [[] if scheduler.requests[n].is_prefill_chunk else [FIRST_OUTPUT + int(n)] for n in names]
        output = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, tokens)
        if self.host is not None:
            output.kv_connector_output = self.host.after_forward(scheduled.kv_connector_metadata)
        self.in_flight.append((scheduled, output))
        while len(self.in_flight) > (1 if self.is_async and names else 0):
            scheduler.update_from_output(*self.in_flight.pop(0))

    def finish(self) -> None:
        """Run all requests to their end, then check that no blocks (invariant 5) and no rows are held."""
        for _ in range(20_000):
            if not (self.scheduler.has_requests() or self.in_flight):
                break
            self.step()
        else:
            raise AssertionError("the requests do not come to an end")
        stats, manager = self.scheduler.engine_stats(), self.scheduler.kv_managers[0]
        assert stats["free_kv_blocks"] == stats["num_kv_blocks"]
        assert not manager._progress and not manager.req_to_blocks and not self.worker.rows
        self.counts["events"] += stats["num_windows_compressed"]
        self.counts["engines"] += 1
        if self.host is not None:
            self.counts["blocks stored"] += self.host.num_copied[True]
            self.counts["blocks loaded"] += self.host.num_copied[False]

    # ------------------------------------------------------------------ what must hold

    def _begin_texts(self, scheduled: SchedulerOutput) -> None:
        """A request that starts, for the first time or once more after a preemption, has written nothing yet."""
        cached = scheduled.scheduled_cached_reqs
        for name in [*(new.req_id for new in scheduled.scheduled_new_reqs), *cached.resumed_req_ids]:
            self.num_texts += 1
            self.counts["resumed"] += name in self.texts
            arrival = self.arrivals[name]
            geometry = self.geometries.of(self.scheduler.requests[name].sampling_params)
            assert not isinstance(geometry, GroupedGeometry)
            # A request that is not compressed finds its own blocks again in the prefix cache; any other starts anew.
            owner = self.num_texts if geometry is not None else FIRST_OUTPUT + int(name)
            self.texts[name] = Text(owner, arrival, self.config, geometry)

    def _check_step(self, step: Step) -> None:
        manager, pool = self.scheduler.kv_managers[0], self.scheduler.kv_cache_manager.block_pool
        for i, name in enumerate(step.req_ids):
            text = self.texts[name]
            text.begin_step(step.computed[i])
            assert step.num_events[i] == (None if text.geometry is None else text.num_events)
            if text.geometry is not None:
                progress = manager._progress[name]
                assert progress is not None and progress.num_events == text.num_events  # scheduler and worker agree
        for block_id in self.worker.written:  # invariant 4
            assert pool.blocks[block_id].ref_cnt == 1 and pool.blocks[block_id].block_hash is None
        assert len(set(self.worker.written)) == len(self.worker.written)

    def _forward(self, step: Step) -> None:
        """All tokens are written, as in every layer, before any are read: a request may find in the prefix cache what
        another one computes in the same step.
        """
        manager, pool = self.scheduler.kv_managers[0], self.scheduler.kv_cache_manager.block_pool
        keys, values = self.cache.keys[0], self.cache.values[0]
        queries = []
        for i, name in enumerate(step.req_ids):
            text, first, count = self.texts[name], step.computed[i], step.counts[i]
            tokens = torch.arange(first, first + count)
            blocks = step.logical_tables[i, tokens // BLOCK_SIZE].long()
            keys[blocks, tokens % BLOCK_SIZE] = values[blocks, tokens % BLOCK_SIZE] = text.labels(first, first + count)
            if text.geometry is not None:
                for block_id in blocks[tokens >= text.arrival.num_prompt_tokens].tolist():  # invariant 4
                    assert pool.blocks[block_id].ref_cnt == 1 and pool.blocks[block_id].block_hash is None
            queries.append(text.queries(first, first + count))
            text.append(count)
        self.worker.store_queries(torch.cat(queries))
        for i, name in enumerate(step.req_ids):
            expected = self.texts[name].layer.keys
            assert int(step.seq_lens[i]) == len(expected)
            read = step.block_tables[i, : ceil_div(len(expected), BLOCK_SIZE)].long()
            live = [b.block_id for b in manager.req_to_blocks[name] if not b.is_null]
            assert sorted(read.tolist()) == sorted(live)  # invariant 3
            for cache in (keys, values):
                assert torch.equal(cache[read].flatten(0, 1)[: len(expected)], expected)
        self.counts["left out"] += len(self.scheduler.running) - len(step.req_ids)

    def _check_rows(self) -> None:
        """Each running request holds a row of its own, and no other request holds one."""
        rows, running = self.worker.rows, {r.request_id for r in self.scheduler.running}
        compressed = {name for name in running if self.texts[name].geometry is not None}
        assert set(rows) == compressed
        assert len(set(rows.values())) == len(rows) and set(rows.values()) <= set(range(self.max_num_seqs))
        held = self.scheduler.kv_managers[0].req_to_blocks
        assert self.host is not None or set(held) == running  # prompts are loaded before a request runs
        blocks = [*held.values(), *(blocks for _, blocks in self.scheduler.deferred_frees)]
        used = {b.block_id for each in blocks for b in each if not b.is_null}
        assert len(used) == self.scheduler._num_used_blocks()  # nobody else holds blocks
