"""Compression beside vLLM's V1 model runner, which the CPU platform uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvllm.engine import cpu_cache
from kvllm.engine.attention import capture_queries, compressed_layers, shortening_backend
from kvllm.engine.positions import candidate_positions, kept_rows
from kvllm.engine.rope import rope_of
from kvllm.engine.settings import Geometries, kv_config
from kvllm.layout import Geometry, IntArray, Shape
from kvllm.methods import make_method
from kvllm.methods.base import Window
from kvllm.query_bank import QueryBank
from kvllm.query_ring import oldest_slot, prompt_query_positions, query_positions

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers


class CompressorV1:
    """Compacts due windows before a step's attention, and shortens what the step's attention reads.

    `runner` is vLLM's V1 runner with its model loaded. Requests are known by their ids: the runner moves their rows.
    """

    def __init__(self, runner: Any) -> None:
        config = kv_config(runner.vllm_config)
        assert config is not None
        self.runner = runner
        self.config = config
        self.method = make_method(config)
        self.geometries = Geometries(config, runner.cache_config.block_size)
        named_layers = compressed_layers(runner.vllm_config)
        self.layers = list(named_layers.values())
        self.layer_indices = torch.tensor([extract_layer_index(name) for name in named_layers])
        layer = self.layers[0]
        self.query_bank = QueryBank.allocate(
            len(self.layers), runner.max_num_reqs, config.num_queries, layer.num_heads, layer.num_kv_heads,
            layer.head_size, config.query_stride, runner.model_config.dtype,
        )  # fmt: skip
        self.rope = rope_of(runner.model) if self.method.uses_rope else None
        self.free_rows = list(range(runner.max_num_reqs))
        self.rows: dict[str, int] = {}  # request -> row of the query bank
        self.events: dict[str, int] = {}  # request -> events done
        self.survivors: dict[str, Tensor] = {}  # request -> text positions of its survivors, if they can be candidates
        self.reader: cpu_cache.PackedReader | None = None
        # What the current step stores: tokens of the batch, and what the bank is told of each.
        self.stored_tokens: Tensor | None = None
        self.codes: Tensor | None = None
        # What the current step's attention leaves out; None where nothing is shortened.
        self.block_index: Tensor | None = None
        self.num_removed: Tensor | None = None
        capture_queries(self.layers, self._capture, "cpu")
        for each in self.layers:
            each.attn_backend = shortening_backend(each.attn_backend, self._shorten)
        logger.info("KvLLM: %s, query bank of %.0f MiB", config, self.query_bank.num_bytes / 2**20)

    def skip_step(self) -> None:
        """Prepare a step that is not a real batch."""
        self.stored_tokens = self.block_index = self.num_removed = None

    def begin_step(self, num_scheduled_tokens: dict[str, int]) -> None:
        """Compact what is due and plan the step: called after slot mappings, before attention is planned."""
        self.skip_step()
        self._forget_finished()
        batch = self.runner.input_batch
        req_ids = batch.req_ids[: batch.num_reqs]
        geometries: list[Geometry | None] = []
        prompts, events = np.zeros(len(req_ids), np.int64), np.zeros(len(req_ids), np.int64)
        due: list[int] = []
        for i, req_id in enumerate(req_ids):
            request = self.runner.requests[req_id]
            geometry = self.geometries.of(request.sampling_params)
            geometries.append(geometry)
            prompts[i] = request.num_prompt_tokens
            if geometry is None:
                continue
            events[i] = geometry.num_events(request.num_prompt_tokens, int(batch.num_computed_tokens_cpu[i]))
            done = self.events.get(req_id, 0)
            if events[i] == done + 1:
                due.append(i)
            elif events[i] > done:
                raise RuntimeError(f"KvLLM: request {req_id} went past a compression; {done} done, {events[i]} due.")
            self.events[req_id] = int(events[i])
        if due:
            self._compress(due, req_ids, geometries, prompts, events)
        self._plan_capture(req_ids, geometries, prompts, num_scheduled_tokens)
        if events.any():
            self._plan_attention(geometries, prompts, events)

    def _forget_finished(self) -> None:
        for req_id in [r for r in self.rows if r not in self.runner.requests]:
            self.free_rows.append(self.rows.pop(req_id))
        for req_id in [r for r in self.events if r not in self.runner.requests]:
            del self.events[req_id]
            self.survivors.pop(req_id, None)

    def _plan_capture(
        self, req_ids: list[str], geometries: list[Geometry | None], prompts: IntArray, scheduled: dict[str, int]
    ) -> None:
        tokens, codes, start = [], [], 0
        for i, req_id in enumerate(req_ids):
            count = scheduled[req_id]
            geometry = geometries[i]
            computed = int(self.runner.input_batch.num_computed_tokens_cpu[i])
            if geometry is not None and computed + count > prompts[i]:
                end = computed + count
                # A chunk may be longer than the ring: of tokens for one slot only the newest counts.
                first = max(computed, geometry.protected_len(int(prompts[i])), end - self.query_bank.period)
                if first < end:
                    if req_id not in self.rows:
                        self.rows[req_id] = self.free_rows.pop()
                    stored = np.arange(first, end)
                    offsets = stored - geometry.protected_len(int(prompts[i]))
                    tokens.append(start + stored - computed)
                    codes.append(self.query_bank.codes(self.rows[req_id], offsets))
            start += count
        if tokens:
            self.stored_tokens = torch.from_numpy(np.concatenate(tokens))
            self.codes = torch.from_numpy(np.concatenate(codes))

    def _capture(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.stored_tokens is not None and self.codes is not None:
            self.query_bank.store(layer, query[self.stored_tokens], self.codes)

    def _plan_attention(self, geometries: list[Geometry | None], prompts: IntArray, events: IntArray) -> None:
        block_table = self.runner.input_batch.block_table[0]
        width = block_table.get_numpy_array().shape[1]
        index = np.broadcast_to(np.arange(width), (len(events), width)).copy()
        removed = np.zeros(len(events), np.int64)
        for geometry in set(geometries):
            if geometry is not None:
                rows = np.array([g == geometry for g in geometries])
                index[rows] = geometry.block_map(prompts[rows], events[rows], width)
                removed[rows] = geometry.num_removed(prompts[rows], events[rows])
        # Past a request's end the map counts on beyond the table; nothing reads there.
        self.block_index = torch.from_numpy(np.minimum(index, width - 1))
        self.num_removed = torch.from_numpy(removed.astype(np.int32))

    def _shorten(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """`metadata` as the physical cache has it; slot mapping and positions stay logical."""
        if self.block_index is None or self.num_removed is None:
            return metadata
        num_reqs = len(self.num_removed)
        seq_lens, block_table = metadata.seq_lens.clone(), metadata.block_table_tensor.clone()
        seq_lens[:num_reqs] -= self.num_removed
        block_table[:num_reqs] = block_table[:num_reqs].gather(1, self.block_index)
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            upper_bound = upper_bound.clone()
            upper_bound[:num_reqs] -= self.num_removed
        return replace(
            metadata,
            seq_lens=seq_lens,
            block_table_tensor=block_table,
            max_seq_len=int(seq_lens.max()),
            seq_lens_cpu_upper_bound=upper_bound,
        )

    def _compress(
        self,
        due: list[int],
        req_ids: list[str],
        geometries: list[Geometry | None],
        prompts: IntArray,
        events: IntArray,
    ) -> None:
        """Run the method over the due windows, one request at a time, and write the survivors in place."""
        table = self.runner.input_batch.block_table[0].get_numpy_array()
        for i in due:
            geometry = geometries[i]
            assert geometry is not None
            event, prompt = int(events[i]) - 1, int(prompts[i])
            block_ids = table[i, geometry.candidate_blocks(prompt, event)]
            self._compress_request(req_ids[i], geometry, prompt, event, torch.from_numpy(block_ids.astype(np.int64)))
            if event == 0 and (cut := geometry.prompt_shape(prompt)):
                block_ids = table[i, : cut.num_candidates // geometry.block_size]
                self._compress_prompt(req_ids[i], geometry, prompt, cut, torch.from_numpy(block_ids.astype(np.int64)))

    def _compress_prompt(self, req_id: str, geometry: Geometry, prompt: int, cut: Shape, block_ids: Tensor) -> None:
        places = prompt_query_positions(self.config, geometry, prompt)
        shape = (len(self.layers), self.layers[0].num_kv_heads, cut.num_candidates)
        ring_start = self._ring_start(req_id, geometry, 0)
        window = self._window(ring_start, block_ids, places, torch.arange(cut.num_candidates).expand(shape))
        kept = self.method.compress_prompt(window, cut.num_kept)
        self._write(block_ids, *kept_rows(window, kept))

    def _compress_request(self, req_id: str, geometry: Geometry, prompt: int, event: int, block_ids: Tensor) -> None:
        nothing = torch.empty(len(self.layers), self.layers[0].num_kv_heads, 0, dtype=torch.int64)
        survivors = self.survivors.get(req_id, nothing)
        places = query_positions(self.config, geometry, event)
        positions = candidate_positions(geometry, prompt, event, survivors)
        window = self._window(self._ring_start(req_id, geometry, event), block_ids, places, positions)
        kept = self.method.compress(window, geometry.shape(event).num_kept)
        self._write(block_ids, *kept_rows(window, kept))
        if geometry.tracks_survivors:
            before = survivors[..., : geometry.candidate_offset(event)]
            self.survivors[req_id] = torch.cat([before, window.positions.gather(-1, kept.indices)], dim=-1)

    def _ring_start(self, req_id: str, geometry: Geometry, event: int) -> int:
        return self.query_bank.ring_start(self.rows[req_id], oldest_slot(self.config, geometry, event))

    def _window(self, ring_start: int, block_ids: Tensor, places: IntArray, positions: Tensor) -> Window:
        keys, values = self._read(block_ids)
        return Window(
            queries=self.query_bank.of(ring_start),
            query_positions=torch.from_numpy(places),
            keys=keys,
            values=values,
            positions=positions,
            layers=self.layer_indices,
            query_shifts=self.query_bank.shifts,
            rope=self.rope,
        )

    def _read(self, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [num_layers, num_tokens, num_kv_heads, head_dim] of whole blocks, in text order."""
        if self.reader is None:
            self.reader = cpu_cache.PackedReader(self.layers[0].kv_cache, self.layers[0].isa)
        pairs = [self.reader.read(layer.kv_cache, block_ids) for layer in self.layers]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])

    def _write(self, block_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store the survivors [num_layers, num_kept, num_kv_heads, head_dim] in the first slots of the blocks."""
        block_size = self.geometries.block_size
        slots = (block_ids[:, None] * block_size + torch.arange(block_size)).flatten()[: keys.shape[1]]
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            cpu_cache.write(layer.kv_cache, k, v, slots, layer.isa)
