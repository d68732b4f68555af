"""The V2 runner's steps on a cache made here leave in it what the reference's do. Needs no engine.

Here and not beside the engine's tests, since the kernels run: on a GPU, or in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from kvllm.config import KvConfig
from kvllm.engine import runner_v2
from kvllm.engine.runner_v2 import KvModelState, RequestRows
from kvllm.engine.settings import Geometries
from kvllm.kernels.paged import PagedCache
from kvllm.layout import Geometry
from kvllm.methods import make_method
from kvllm.methods.rope import Rope, frequencies
from kvllm.query_bank import QueryBank
from kvllm.reference.cache import LayerCache
from kvllm.reference.request import compress_event
from tests.kernels.paged_caches import random_cache

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 4, 2, 16, 8
MAX_REQS, MAX_BLOCKS = 3, 30
SIZES: dict[str, Any] = {"window_size": 16, "buffer_size": 16, "retention_ratio": 0.5, "query_stride": 4}
NO_REFIT = {"key_ridge": 0.0, "value_ridge": 0.0}
BUDGET: dict[str, Any] = {"budget_size": 16, "budget_interval": 8}


def rope_on(device: str) -> Rope:
    """The second layer has none."""
    rope = Rope.of_layers([Rope(frequencies(1000.0, HEAD_DIM, torch.device(device))), None])
    assert rope is not None and rope.frequencies.shape == (NUM_LAYERS, HEAD_DIM // 2)
    return rope


def model_state(config: KvConfig, cache: PagedCache, device: str) -> Any:
    """What compression needs of a KvModelState, which vLLM alone can build."""
    state: Any = object.__new__(KvModelState)
    state.config, state.method, state.geometries = config, make_method(config), Geometries(config, BLOCK_SIZE)
    state.block_size, state.cache, state.device, state.dtype = BLOCK_SIZE, cache, torch.device(device), torch.float32
    state.max_num_reqs, state.max_num_tokens = MAX_REQS, 64
    state.layers, state.layer_indices = [None] * NUM_LAYERS, torch.arange(NUM_LAYERS, device=device)
    state.rows = RequestRows.empty(MAX_REQS)
    state.query_bank = QueryBank.allocate(
        NUM_LAYERS, MAX_REQS, config.num_queries, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, config.query_stride,
        torch.float32, device,
    )  # fmt: skip
    state.rope = rope_on(device) if state.method.uses_rope else None
    most_survivors = config.budget_size if config.policy == "budget" else config.history_size
    shape = (MAX_REQS, NUM_LAYERS, NUM_KV_HEADS, most_survivors)
    needed = most_survivors and not state._fused
    state.survivors = torch.zeros(shape, dtype=torch.int32, device=device) if needed else None
    state._allocate_step()
    return state


@dataclass
class Running:
    """A request in a slot of the runner: its text, drawn anew, and the reference's cache of it."""

    slot: int
    num_prompt_tokens: int
    block_ids: Tensor  # [MAX_BLOCKS]
    layers: list[LayerCache]
    computed: int = 0
    num_events: int = 0
    new: tuple[Tensor, Tensor, Tensor] = field(init=False)  # queries, keys, values [num_layers, num_new, heads, dim]

    def draw(self, generator: torch.Generator) -> None:
        num_new = 1 if self.computed else self.num_prompt_tokens
        self.new = tuple(  # type: ignore[assignment]
            torch.randn(NUM_LAYERS, num_new, heads, HEAD_DIM, generator=generator)
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        )

    def compress_if_due(self, config: KvConfig, geometry: Geometry) -> None:
        event = self.num_events
        if geometry.num_events(self.num_prompt_tokens, self.computed) == event:
            return
        method = make_method(config)
        rope = rope_on("cpu") if method.uses_rope else None
        compress_event(self.layers, method, config, geometry, self.num_prompt_tokens, event, rope)
        self.num_events += 1


def begin_step(state: Any, running: list[Running], device: str) -> Tensor:
    """What the V2 runner does before a step's forward pass; returns the batch's shortened block tables."""
    counts = np.array([r.new[0].shape[1] for r in running])
    computed = np.array([r.computed for r in running])
    seq_lens = torch.from_numpy(computed + counts).int().to(device)
    batch = SimpleNamespace(
        num_reqs=len(running),
        req_ids=[str(r.slot) for r in running],
        idx_mapping_np=np.array([r.slot for r in running]),
        num_computed_tokens_np=computed,
        num_scheduled_tokens=counts,
        num_tokens=int(counts.sum()),
        num_tokens_after_padding=int(counts.sum()),
        seq_lens=seq_lens,
    )
    tables = torch.stack([r.block_ids for r in running])
    state.preprocess_state(batch, (tables,), None, None)
    return tables


@pytest.mark.parametrize(
    "config, num_events",
    [
        (KvConfig(method="kara", method_options=NO_REFIT, **SIZES), 7),
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
    ],
    ids=(
        "windows still generic refitted refitted-history history history-random history-merged budget budget-random "
        "prompt prompt-refitted prompt-cask prompt-budget"
    ).split(),
)
def test_equals_reference(config: KvConfig, num_events: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests, the second three windows behind: what meets are rings that start elsewhere, events of both shapes,
    and histories of two lengths.
    """
    if config.prompt_budget:
        monkeypatch.setattr(runner_v2, "_GENERIC_BATCH", 1)  # a prompt of three blocks then goes one layer at a time
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
    state = model_state(config, cache, device)
    geometry = state.geometries.of(None)
    block_ids = torch.randperm(MAX_REQS * MAX_BLOCKS, generator=generator).int().view(MAX_REQS, MAX_BLOCKS).to(device)
    running: list[Running] = []
    last = geometry.event_at(20, num_events - 1) + 2
    while len(running) < 2 or running[0].computed < last:
        if not running or (len(running) == 1 and running[0].computed == 20 + 3 * config.window_size - 1):
            request = Running(
                slot=2 - len(running),
                num_prompt_tokens=20,
                block_ids=block_ids[len(running)],
                layers=[LayerCache(config.query_span) for _ in range(NUM_LAYERS)],
            )
            state.rows.set(request.slot, geometry, request.num_prompt_tokens)
            running.insert(0, request)
        for request in running:
            request.draw(generator)
        tables = begin_step(state, running, device)
        for i, request in enumerate(running):
            request.compress_if_due(config, geometry)
            num_new = request.new[0].shape[1]
            length = len(request.layers[0].keys) if request.computed else 0
            assert int(state.seq_lens[i]) == length + num_new
            assert request.computed - state.num_removed[i] == length
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
            new = (torch.cat([request.new[i][layer] for request in running]).to(device) for i in range(3))
            state._store(layer, *new, torch.cat(slots))
        for request in running:
            for layer, (queries, keys, values) in enumerate(zip(*request.new, strict=True)):
                request.layers[layer].append(queries, keys, values)
            request.computed += request.new[0].shape[1]
    assert running[0].num_events == num_events


@pytest.mark.parametrize("options", [{}, {"history_size": 24}, {"policy": "budget", **BUDGET}])
def test_heads_that_the_kernels_do_not_refit(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_v2, "MOST_DIMS", HEAD_DIM - 1)
    monkeypatch.setattr(runner_v2, "refit", None)
    test_equals_reference(KvConfig(method="kara", **options, **SIZES), 5, device, monkeypatch)


def test_plan_of_a_mixed_batch(device: str) -> None:
    """A decode, a chunk longer than the ring, one that is not compressed, and padding."""
    config = KvConfig(method="kara", **SIZES)
    cache = random_cache(
        num_layers=1, num_blocks=1, block_size=BLOCK_SIZE, num_kv_heads=1, head_dim=16, dtype=torch.float32,
        device=device,
    )  # fmt: skip
    state = model_state(config, cache, device)
    geometry, addresses = state.geometries.of(None), (state.plan[0].data_ptr(), state.bank_codes.data_ptr())
    rows = [(2, geometry, 5, 12, 1), (0, geometry, 3, 0, 40), (1, None, 5, 12, 2)]
    for slot, own, prompt, _, _ in rows:
        state.rows.set(slot, own, prompt)
    state.plan[runner_v2._EVENTS].fill_(9)
    computed, counts = np.array([r[3] for r in rows], np.int32), np.array([r[4] for r in rows], np.int32)
    batch = SimpleNamespace(
        num_reqs=3, idx_mapping_np=np.array([r[0] for r in rows]), num_computed_tokens_np=computed,
        num_scheduled_tokens=counts, num_tokens=43, num_tokens_after_padding=48,
        seq_lens=torch.from_numpy(computed + counts).to(device),
    )  # fmt: skip
    state.preprocess_state(batch, (torch.zeros(3, MAX_BLOCKS, dtype=torch.int32, device=device),), None, None)
    period, expected = config.query_span, []
    for slot, own, prompt, first, count in rows:
        protected = own.protected_len(prompt) if own else 10**6
        for token in range(first, first + count):
            stored = token >= protected and token >= first + count - period
            expected.append(slot * period + (token - protected) % period if stored else -1)
    assert state.bank_codes[:48].tolist() == [*expected, *[-1] * 5]
    assert state.plan[runner_v2._EVENTS].tolist()[:3] == [0, 0, 0]
    assert (state.plan[0].data_ptr(), state.bank_codes.data_ptr()) == addresses

    # Attention sees what is left of a request; afterwards the batch is what it was.
    state.prepared, state.num_removed = batch, np.array([8, 0, 3])
    batch.seq_lens_cpu_upper_bound = torch.tensor([13, 40, 14, 0], dtype=torch.int32)
    before = dict(vars(batch))
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultModelState, "prepare_attn", lambda _, batch, *args: seen.update(vars(batch)))
        state.prepare_attn(batch, None, ())
    assert seen["seq_lens_cpu_upper_bound"].tolist() == [5, 40, 11, 0]
    assert seen["seq_lens"].data_ptr() == state.seq_lens.data_ptr() and seen["seq_lens"].tolist() == [13, 40, 14]
    assert all(vars(batch)[name] is value for name, value in before.items())
    assert before["seq_lens_cpu_upper_bound"].tolist() == [13, 40, 14, 0]
