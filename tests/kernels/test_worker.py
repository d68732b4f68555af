"""What a worker keeps leaves in a paged cache what the reference keeps, step by step. Needs no engine.

Here and not beside the engine's tests, since the kernels run: on a GPU, or in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvllm.checks import allowed_geometries
from kvllm.compression.compressor import Compressor, most_survivors
from kvllm.compression.paged_store import PagedCandidates
from kvllm.compression.query_ring import query_shifts
from kvllm.compression.rows import TAIL, Due
from kvllm.compression.worker import Layers, WorkerState
from kvllm.config import KvConfig
from kvllm.engine.settings import Geometries
from kvllm.engine.store_gpu import GpuStore
from kvllm.kernels import kara as kara_kernels
from kvllm.kernels.block_tables import join_segments, join_segments_ref
from kvllm.kernels.fused import fused_kernels, has_fused_kernels
from kvllm.kernels.paged import PagedCache
from kvllm.kernels.store_tokens import NewPairs, store_tokens, store_tokens_ref
from kvllm.layout import Geometry
from kvllm.methods import make_method, make_methods
from kvllm.methods.rope import Rope, frequencies
from kvllm.reference.cache import DenseStore, LayerCache
from tests.kernels.paged_caches import random_cache

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 4, 2, 16, 8
MAX_REQS, MAX_BLOCKS = 3, 30
SIZES: dict[str, Any] = {"window_size": 16, "buffer_size": 16, "retention_ratio": 0.5, "query_stride": 4}
NO_REFIT = {"key_ridge": 0.0, "value_ridge": 0.0}
BUDGET: dict[str, Any] = {"budget_size": 16, "budget_interval": 8}

WINDOWS = KvConfig(method="kara", method_options=NO_REFIT, **SIZES)


def rope_on(device: str) -> Rope:
    return Rope(frequencies(1000.0, HEAD_DIM, torch.device(device)))


def worker_state(config: KvConfig, cache: PagedCache, device: str, head_dim: int = HEAD_DIM) -> WorkerState:
    """What the V2 runner keeps, over a cache made here."""
    methods = make_methods(config).values()
    layers = Layers(range(NUM_LAYERS), NUM_HEADS, NUM_KV_HEADS, head_dim, torch.float32)
    state = WorkerState(
        config, layers, rope_on(device) if any(method.uses_rope for method in methods) else None, MAX_REQS, 64, device,
        all(has_fused_kernels(method, head_dim) for method in methods),
    )  # fmt: skip
    store = GpuStore(
        config, state.bank, BLOCK_SIZE, MAX_BLOCKS * BLOCK_SIZE,
        lambda numbers: torch.tensor(numbers, device=device), cache=cache, dtype=torch.float32,
    )  # fmt: skip
    kernels = {
        name: fused_kernels(method, config, state.bank, cache, state.rope_for(method))
        for name, method in state.methods.items()
    }
    state.attach(store, kernels)
    return state


@dataclass
class Running:
    """A request in a row of the runner: a new random text, and the reference's cache of it."""

    method: str
    row: int
    num_prompt_tokens: int
    block_ids: Tensor  # [MAX_BLOCKS]
    layers: list[LayerCache]
    computed: int = 0
    num_events: int = 0
    compressor: Compressor | None = None
    new: tuple[Tensor, Tensor, Tensor] = field(init=False)  # queries, keys, values [num_layers, num_new, heads, dim]

    def draw(self, generator: torch.Generator) -> None:
        num_new = 1 if self.computed else self.num_prompt_tokens
        self.new = tuple(  # type: ignore[assignment]
            torch.randn(NUM_LAYERS, num_new, heads, HEAD_DIM, generator=generator)
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        )

    def compress_if_due(self, config: KvConfig, geometry: Geometry) -> None:
        if geometry.num_events(self.num_prompt_tokens, self.computed) == self.num_events:
            return
        if self.compressor is None:
            method, shape = make_method(config), (1, NUM_LAYERS, NUM_KV_HEADS, most_survivors(config))
            self.compressor = Compressor(
                config, method, DenseStore(config, self.layers), torch.arange(NUM_LAYERS),
                torch.from_numpy(query_shifts(config.query_stride, NUM_HEADS // NUM_KV_HEADS)),
                rope_on("cpu") if method.uses_rope else None, torch.zeros(shape, dtype=torch.int32),
            )  # fmt: skip
        self.compressor.compress([Due(0, 0, geometry, self.num_prompt_tokens, self.num_events)])
        self.num_events += 1


def all_kernels(config: KvConfig, device: str) -> bool:
    """Whether those that do the same whatever the method run too: in the interpreter they take half of a test's time,
    and two configurations show what they do.
    """
    return device != "cpu" or config.prompt_budget == 16 or config == WINDOWS


def begin_step(state: WorkerState, running: list[Running], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The work of a runner before a step's forward pass.

    returns the batch's block tables and lengths as attention reads them, and the tokens removed
    """
    counts = np.array([r.new[0].shape[1] for r in running])
    computed, rows = np.array([r.computed for r in running]), np.array([r.row for r in running])
    tables = torch.stack([r.block_ids for r in running])
    removed = state.begin_step(rows, computed, [str(r.row) for r in running], tables)
    host = np.full(state.plan_size + int(counts.sum()), 77, np.int32)
    state.write_plan(host, rows, computed, counts)
    state.step[: len(host)].copy_(torch.from_numpy(host))
    seq_lens = torch.from_numpy(computed + counts).int().to(device)
    assert state.store is not None
    join = join_segments if all_kernels(state.config, device) else join_segments_ref
    join(tables, seq_lens, seq_lens, state.store.survivor_blocks, state.plan, BLOCK_SIZE)
    return tables, seq_lens, torch.from_numpy(removed)


@pytest.mark.parametrize(
    "config, num_events",
    [
        (WINDOWS, 7),
        (KvConfig(method="kara", method_options={"lookahead": 0, "keydiff_power": 0.5} | NO_REFIT, **SIZES), 4),
        (KvConfig(method="kara", method_options={"moment": "rms"} | NO_REFIT, **SIZES), 4),
        (KvConfig(method="kara", **SIZES), 5),
        (KvConfig(method="kara", history_size=24, **SIZES), 4),
        (KvConfig(method="kara", method_options=NO_REFIT, history_size=24, **SIZES), 7),
        (KvConfig(method="random", history_size=24, **SIZES), 7),
        (KvConfig(method="cask", history_size=8, **SIZES), 7),
        (KvConfig(method="kara", method_options=NO_REFIT, policy="budget", **BUDGET, **SIZES), 13),
        (KvConfig(method="random", policy="budget", **BUDGET, **SIZES), 13),
        (KvConfig(method="kara", method_options=NO_REFIT, prompt_budget=8, **SIZES), 4),
        (KvConfig(method="kara", method_options={"key_ridge": 0.0}, prompt_budget=16, **SIZES), 3),
        (KvConfig(method="cask", prompt_budget=8, history_size=8, **SIZES), 4),
        (KvConfig(method="random", prompt_budget=8, policy="budget", **BUDGET, **SIZES), 5),
        (KvConfig(method="random", request_methods={"kara": NO_REFIT}, history_size=24, **SIZES), 4),
    ],
    ids=(
        "windows still generic refitted refitted-history history history-random history-merged budget budget-random "
        "prompt prompt-refitted prompt-cask prompt-budget history-of-two-methods"
    ).split(),
)
def test_equals_reference(config: KvConfig, num_events: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests, the second three windows behind: what meets are rings that start elsewhere, events of both shapes,
    and histories of two lengths. Where requests may choose their method, they have different ones: kernels for one of
    them, and PyTorch for the other.
    """
    if config.prompt_budget:
        monkeypatch.setattr(GpuStore, "max_batch", 1)  # a prompt of three blocks then goes one layer at a time
    # What is refitted, and cask's means, are sums; what only moves is the same bit for bit.
    method = make_method(config)
    moved = 0.0 if config.method == "kara" else 1e-6
    off_keys = 1e-4 if getattr(method, "key_ridge", 0) > 0 else 0.0
    off_values = 1e-4 if getattr(method, "value_ridge", 0) > 0 else moved
    generator = torch.Generator().manual_seed(0)
    cache = random_cache(
        num_layers=NUM_LAYERS, num_blocks=MAX_REQS * MAX_BLOCKS, block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM, dtype=torch.float32, device=device,
    )  # fmt: skip
    state = worker_state(config, cache, device)
    geometry = Geometry.from_config(config, BLOCK_SIZE)
    assert geometry is not None
    block_ids = torch.randperm(MAX_REQS * MAX_BLOCKS, generator=generator).int().view(MAX_REQS, MAX_BLOCKS).to(device)
    store = store_tokens if all_kernels(config, device) else store_tokens_ref
    running: list[Running] = []
    last = geometry.event_at(20, num_events - 1) + 2
    while len(running) < 2 or running[0].computed < last:
        if not running or (len(running) == 1 and running[0].computed == 20 + 3 * config.window_size - 1):
            request = Running(
                config.methods[len(running) % len(config.methods)],
                row=2 - len(running),
                num_prompt_tokens=20,
                block_ids=block_ids[len(running)],
                layers=[LayerCache(config.query_span) for _ in range(NUM_LAYERS)],
            )
            state.rows.set(request.row, geometry, request.num_prompt_tokens, request.method)
            running.insert(0, request)
        for request in running:
            request.draw(generator)
        tables, seq_lens, removed = begin_step(state, running, device)
        for i, request in enumerate(running):
            request.compress_if_due(config.of_method(request.method), geometry)
            num_new = request.new[0].shape[1]
            length = len(request.layers[0].keys) if request.computed else 0
            assert int(seq_lens[i]) == length + num_new
            assert request.computed - int(removed[i]) == length
            tokens = torch.arange(length, device=device)
            at = (tables[i, tokens // BLOCK_SIZE].long(), tokens % BLOCK_SIZE)
            for layer in range(NUM_LAYERS if length else 0):
                keys, values = cache.keys[layer][at].cpu(), cache.values[layer][at].cpu()
                kept = request.layers[layer]
                torch.testing.assert_close(keys, kept.keys, rtol=off_keys, atol=off_keys)
                torch.testing.assert_close(values, kept.values, rtol=off_values, atol=off_values)
        slots = []
        for request in running:
            tokens = torch.arange(request.computed, request.computed + request.new[0].shape[1], device=device)
            slots.append(request.block_ids[tokens // BLOCK_SIZE].long() * BLOCK_SIZE + tokens % BLOCK_SIZE)
        for layer in range(NUM_LAYERS):
            queries, keys, values = (
                torch.cat([request.new[i][layer] for request in running]).to(device) for i in range(3)
            )
            store(queries, state.bank, layer, state.codes, NewPairs(keys, values, cache, torch.cat(slots)))
        for request in running:
            for layer, (queries, keys, values) in enumerate(zip(*request.new, strict=True)):
                request.layers[layer].append(queries, keys, values)
            request.computed += request.new[0].shape[1]
    assert running[0].num_events == num_events


@pytest.mark.parametrize("history_size", [0, 48])
def test_every_shape_that_a_request_may_choose_is_compiled_before_serving(
    history_size: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled per number of candidates and of survivors; no live step may need a new combination."""
    sizes = SIZES | {"window_size": 48, "retention_ratio": 0.2, "history_size": history_size}
    config = KvConfig(method="kara", request_ratios="0.3-0.33,0.85,1.0", **sizes)
    cache = random_cache(
        num_layers=NUM_LAYERS, num_blocks=MAX_BLOCKS, block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM, dtype=torch.float32, device=device,
    )  # fmt: skip
    state, compiled = worker_state(config, cache, device), []
    assert state.compressors["kara"].fused is not None

    def fused(candidates: PagedCandidates, num_kept: int) -> None:
        compiled.append((candidates.blocks.shape[1] * BLOCK_SIZE, num_kept))

    monkeypatch.setattr(state.compressors["kara"], "fused", fused)
    geometries = Geometries(config, BLOCK_SIZE)
    state.warm_up(allowed_geometries(config, BLOCK_SIZE))
    ratios = [0.2, 0.85, *np.random.default_rng(0).uniform(0.3, 0.33, 200)]
    made = {geometry for r in ratios if (geometry := geometries.of_ratio(float(r)))}
    shapes = {geometry.shape(event) for geometry in made for event in range(60)}
    assert {(s.num_candidates, s.num_kept) for s in shapes if s.num_kept < s.num_candidates} == set(compiled)


@pytest.mark.parametrize("options", [{}, {"history_size": 24}, {"policy": "budget", **BUDGET}])
def test_heads_that_the_kernels_do_not_refit(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kara_kernels, "MOST_DIMS", HEAD_DIM - 1)
    monkeypatch.setattr(kara_kernels, "refit", None)
    assert not has_fused_kernels(make_method(KvConfig()), HEAD_DIM)
    without_refit = make_method(KvConfig(method_options={"key_ridge": 0, "value_ridge": 0}))
    assert has_fused_kernels(without_refit, 256) and not has_fused_kernels(without_refit, 512)
    test_equals_reference(KvConfig(method="kara", **options, **SIZES), 5, device, monkeypatch)


def test_plan_of_a_mixed_batch(device: str) -> None:
    """A decode, a chunk longer than the ring, one that is not compressed, and padding."""
    config = KvConfig(method="kara", **SIZES)
    cache = random_cache(
        num_layers=NUM_LAYERS, num_blocks=1, block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    state, geometry = worker_state(config, cache, device), Geometry.from_config(config, BLOCK_SIZE)
    assert geometry is not None
    rows: list[tuple[int, Geometry | None, int, int, int]] = [
        (2, geometry, 5, 12, 1), (0, geometry, 3, 0, 40), (1, None, 5, 12, 2),
    ]  # fmt: skip
    for row, own, prompt, _, _ in rows:
        state.rows.set(row, own, prompt, None)
    order, computed, counts = (np.array([r[i] for r in rows]) for i in (0, 3, 4))
    table = torch.zeros(3, MAX_BLOCKS, dtype=torch.int32, device=device)
    assert state.begin_step(order, computed, ["a", "b", "c"], table).tolist() == [0, 0, 0]
    host = np.full(state.plan_size + 48, 77, np.int32)
    state.write_plan(host, order, computed, counts)
    period, expected = config.query_span, []
    for row, own, prompt, first, count in rows:
        protected = own.protected_len(prompt) if own else 10**6
        for token in range(first, first + count):
            stored = token >= protected and token >= first + count - period
            expected.append(row * period + (token - protected) % period if stored else -1)
    assert host[state.plan_size :].tolist() == [*expected, *[-1] * 5]
    plan = host[: state.plan_size].reshape(4, -1)
    assert plan[TAIL].tolist() == [0, 0, 0, 0] and plan[3].tolist()[:3] == [2, 0, 1]


def test_a_request_that_skips_a_compression_is_an_error(device: str) -> None:
    config = KvConfig(method="random", **SIZES)
    state = WorkerState(config, Layers([0], 2, 1, 8, torch.float32), None, MAX_REQS, 64, device)
    geometry = Geometry.from_config(config, BLOCK_SIZE)
    assert geometry is not None
    state.rows.set(1, geometry, 5, None)
    late = np.array([geometry.event_at(5, 1)])
    with pytest.raises(RuntimeError, match=r"\{'late': \(0, 2\)\}"):
        state.rows.begin_step(np.array([1]), late, ["late"])
