"""Compression inside vLLM's V2 model runner, the default on GPUs, under full CUDA graphs.

Whatever a captured graph reads keeps its address: the query bank, the slots that each token's query goes to, the
physical sequence lengths, and vLLM's own gathered block tables, which are refilled every step and shortened in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.utils.torch_utils import async_tensor_h2d, is_quantized_kv_cache
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from kvllm.engine.attention import capture_queries, compressed_layers, store_with_queries
from kvllm.engine.positions import candidate_positions, paired_rows
from kvllm.engine.rope import rope_of
from kvllm.engine.settings import Geometries, kv_config
from kvllm.kernels.block_tables import shorten_block_tables
from kvllm.kernels.compact import compact
from kvllm.kernels.paged import PagedCache
from kvllm.kernels.refit import MOST_DIMS, refit
from kvllm.kernels.select_chunks import select_chunks
from kvllm.kernels.store_tokens import store_tokens
from kvllm.kernels.window_scores import window_scores
from kvllm.kernels.windows import gather_window, gather_window_ref, scatter_window
from kvllm.layout import Geometry, IntArray, Shape, ceil_div
from kvllm.methods import make_method
from kvllm.methods.base import Kept, Window
from kvllm.methods.kara import Kara
from kvllm.methods.rope import Turn
from kvllm.query_bank import QueryBank
from kvllm.query_ring import oldest_slot, prompt_query_positions, query_positions
from kvllm.support import model_state_reasons

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers

# What is known of a request, a number each; the first _PLANNED of them go to the GPU in every step.
_PROTECTED, _EVENTS, _KEPT, _DROPPED, _FIXED, _CUT, _START, _REMOVED = range(8)
_PLANNED = 6
# Windows that a method without kernels of its own sees at once: dense copies of all layers are large.
_GENERIC_BATCH = 4

_LARGE_BANK = 0.05  # share of the device's memory from which on a max_num_seqs that was asked for is worth a thought


@cache
def compressing(cls: type) -> type:
    """`cls` with compression; ValueError for a model state that we do not know to be plain full attention."""
    for reason in model_state_reasons(cls):
        raise ValueError(f"KvLLM does not support {reason}.")
    return KvModelState


@dataclass
class RequestRows:
    """What is known of the request in each of the runner's slots.

    columns: [8, max_num_reqs], the rows named above: blocks that are _PROTECTED, the prompt's; _EVENTS done; blocks
             _KEPT by one event; groups _DROPPED by all of them; groups that stay, _FIXED, when the history is
             compressed; blocks _CUT out of the prompt by event 0; the _START in computed tokens from which on queries
             are kept, past every length where nothing is compressed; tokens _REMOVED by all events
    """

    geometries: list[Geometry | None]
    num_prompt_tokens: list[int]
    columns: IntArray

    @classmethod
    def empty(cls, max_num_reqs: int) -> RequestRows:
        return cls([None] * max_num_reqs, [0] * max_num_reqs, np.zeros((8, max_num_reqs), np.int64))

    def set(self, row: int, geometry: Geometry | None, num_prompt_tokens: int) -> None:
        self.geometries[row], self.num_prompt_tokens[row] = geometry, num_prompt_tokens
        column = self.columns[:, row]
        column[:] = 0
        column[_START] = np.iinfo(np.int64).max // 2
        if geometry is not None:
            block_size = geometry.block_size
            column[_START] = geometry.protected_len(num_prompt_tokens)
            column[_PROTECTED] = column[_START] // block_size
            column[_KEPT] = geometry.num_kept // block_size
            column[_FIXED] = geometry.history_kept // geometry.num_kept
            column[_CUT] = geometry.num_prompt_removed(num_prompt_tokens, 1) // block_size

    def count_event(self, row: int) -> int:
        """Another event of a compressed request; returns its number."""
        geometry, column = self.geometries[row], self.columns[:, row]
        assert geometry is not None
        event = int(column[_EVENTS])
        column[_EVENTS] = event + 1
        column[_DROPPED] = geometry.num_dropped_groups(event + 1)
        column[_REMOVED] = geometry.num_removed(self.num_prompt_tokens[row], event + 1)
        return event


class KvModelState(DefaultModelState):
    """vLLM's model state, which also compacts due windows before a step and shortens what its attention reads."""

    def __init__(self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        config = kv_config(vllm_config)
        assert config is not None
        self.config = config
        self.method = make_method(config)
        self.block_size = vllm_config.cache_config.block_size
        self.geometries = Geometries(config, self.block_size)
        named_layers = compressed_layers(vllm_config)
        self.layers = list(named_layers.values())
        self.layer_indices = torch.tensor([extract_layer_index(name) for name in named_layers], device=device)
        layer = self.layers[0]
        self.rows = RequestRows.empty(self.max_num_reqs)
        # Allocated with the model, so before vLLM profiles its memory and sizes the KV pool.
        self.query_bank = QueryBank.allocate(
            len(self.layers), self.max_num_reqs, config.num_queries, layer.num_heads, layer.num_kv_heads,
            layer.head_size, config.query_stride, self.dtype, device,
        )  # fmt: skip
        self.rope = rope_of(model) if self.method.uses_rope else None
        # Text positions of survivors that will be candidates again, [max_num_reqs, num_layers, num_kv_heads, most of
        # them]; int32 holds them.
        self.survivors: Tensor | None = None
        most_survivors = config.budget_size if config.policy == "budget" else config.history_size
        if most_survivors and not self._fused:
            self.survivors = torch.zeros(
                self.max_num_reqs, len(self.layers), layer.num_kv_heads, most_survivors,
                dtype=torch.int32, device=device,
            )  # fmt: skip
        self.cache: PagedCache | None = None
        self.prepared: InputBatch | None = None  # the real batch that preprocess_state has planned
        self.num_removed = np.zeros(0, np.int64)
        self._allocate_step()
        if is_quantized_kv_cache(layer.kv_cache_dtype):
            capture_queries(self.layers, self._store, "cuda")  # what is quantised, vLLM writes itself
        else:
            store_with_queries(self.layers, self._store, "cuda")
        size, total = self.query_bank.num_bytes, torch.cuda.get_device_properties(device).total_memory
        logger.info("KvLLM: %s, query bank of %.2f GiB for max_num_seqs=%d", config, size / 2**30, self.max_num_reqs)
        if size > _LARGE_BANK * total:
            logger.warning(
                "KvLLM: the query bank takes %.0f%% of the GPU's memory; a max_num_seqs below %d leaves more of it to "
                "the KV cache.",
                100 * size / total,
                self.max_num_reqs,
            )

    def _allocate_step(self) -> None:
        """Sizes of every step, and what it tells the GPU: the plan and the bank's codes, side by side for one copy."""
        config, device = self.config, self.device
        # Where no request is compressed unless it asks, sizes still come from the default configuration.
        self.interval = config.window_size if config.policy == "window" else config.budget_interval
        self.num_candidates = (
            config.window_size if config.policy == "window" else config.budget_size + config.budget_interval
        )
        self.plan_stride = ceil_div(self.max_num_reqs, 4) * 4  # every row starts at a multiple of 16 bytes
        size = _PLANNED * self.plan_stride
        self.step = torch.full((size + self.max_num_tokens,), -1, dtype=torch.int32, device=device)
        self.plan = self.step[:size].view(_PLANNED, -1).unbind()
        self.bank_codes = self.step[size:]
        self.seq_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)

    # ------------------------------------------------------------------ requests

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.rows.set(req_index, self.geometries.of(new_req_data.sampling_params), new_req_data.prompt_len)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        if list(block_tables.block_sizes) != [self.block_size]:
            raise ValueError(
                f"KvLLM needs one KV cache group with blocks of {self.block_size} tokens; vLLM made "
                f"{list(block_tables.block_sizes)}."
            )
        pairs = [layer.kv_cache.transpose(1, 2).split(layer.head_size, dim=-1) for layer in self.layers]
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if pairs[0][0].dtype.itemsize == 1:
            # Queries reach the backend quantised too: their scale goes into the logits with the keys'.
            k_scale = [layer._k_scale_float * self._query_scale(layer) for layer in self.layers]
            v_scale = [layer._v_scale_float for layer in self.layers]
            scales = (torch.tensor(k_scale, device=self.device), torch.tensor(v_scale, device=self.device))
        self.cache = PagedCache.from_layers([k for k, _ in pairs], [v for _, v in pairs], *scales)
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile the kernels of the engine's own ratio now, not in the step that first needs them."""
        geometry = Geometry.from_config(self.config, self.block_size)
        if geometry is None:
            return
        for event in geometry.first_of_each_shape:
            # All candidates in the null block, which nobody reads.
            num_blocks = geometry.shape(event).num_candidates // self.block_size
            blocks = torch.zeros(1, num_blocks, dtype=torch.int32, device=self.device)
            row = torch.zeros(1, dtype=torch.int32, device=self.device)
            self._compress_group(geometry, [1], [event], row, blocks)

    @staticmethod
    def _query_scale(layer: Any) -> float:
        return float(layer._q_scale_float) if layer.impl.supports_quant_query_input else 1.0

    # ------------------------------------------------------------------ one step

    def _store(self, layer: int, query: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor | None = None) -> None:
        if self.cache is None:  # a run that only measures memory
            return
        assert query.shape[0] <= self.max_num_tokens
        queries = query.view(-1, *self.query_bank.queries.shape[3:])
        store_tokens(queries, self.query_bank, layer, self.bank_codes, key, value, self.cache, slot_mapping)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: Any,
        num_computed_tokens: Tensor,
    ) -> None:
        """Compact what is due, then shorten the step's block tables and lengths. Real batches only."""
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        num_reqs, slots = input_batch.num_reqs, input_batch.idx_mapping_np[: input_batch.num_reqs]
        columns = self.rows.columns.take(slots, axis=1)
        offsets = input_batch.num_computed_tokens_np[:num_reqs] - columns[_START]
        grown = offsets - (self.num_candidates + self.config.buffer_size)
        events = np.maximum(grown // self.interval + 1, 0)
        if (due := events != columns[_EVENTS]).any():
            if (events > columns[_EVENTS] + 1).any():
                late = [input_batch.req_ids[i] for i in np.nonzero(events > columns[_EVENTS] + 1)[0]]
                raise RuntimeError(f"KvLLM: requests {late} went past a compression.")
            self._compress([(i, int(slots[i])) for i in due.nonzero()[0].tolist()], block_tables[0])
            columns = self.rows.columns.take(slots, axis=1)
        self._send_plan(input_batch, slots, columns, offsets)
        self._shorten(input_batch, block_tables[0])
        self.num_removed = columns[_REMOVED]
        self.prepared = input_batch

    def _send_plan(self, input_batch: InputBatch, slots: IntArray, columns: IntArray, offsets: IntArray) -> None:
        """Tell the GPU what the step's requests are, and which tokens' queries go where.

        columns: of `RequestRows`, [8, num_reqs]; offsets: [num_reqs], computed tokens from _START on
        """
        plan_size = _PLANNED * self.plan_stride
        size = plan_size + input_batch.num_tokens_after_padding
        # Written where the GPU can read it, which it may do after this step.
        staged = torch.empty(size, dtype=torch.int32, pin_memory=is_pin_memory_available())
        host = staged.numpy()
        plan, codes = host[:plan_size].reshape(_PLANNED, -1), host[plan_size:]
        plan[:, : len(slots)] = columns[:_PLANNED]
        plan[_EVENTS, len(slots) :] = 0  # of a request without events nothing else is read
        oldest: Any = 0
        if input_batch.num_tokens > len(slots):
            counts = input_batch.num_scheduled_tokens[: len(slots)]
            row = np.repeat(np.arange(len(slots)), counts)
            within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
            # A chunk may be longer than the ring: of tokens for one slot only the newest counts.
            oldest = np.maximum(offsets + counts - self.query_bank.period, 0)[row]
            offsets, slots = offsets[row] + within, slots[row]
        codes[: len(slots)] = np.where(offsets >= oldest, self.query_bank.codes(slots, offsets), -1)
        codes[len(slots) :] = -1
        self.step[:size].copy_(staged, non_blocking=True)

    def _shorten(self, input_batch: InputBatch, block_table: Tensor) -> None:
        protected, events, kept, dropped, fixed, cut = self.plan
        shorten_block_tables(
            block_table,
            input_batch.seq_lens,
            self.seq_lens[: input_batch.seq_lens.shape[0]],
            protected,
            events,
            kept,
            dropped,
            fixed,
            cut,
            self.num_candidates // self.block_size,
            self.interval // self.block_size,
            self.block_size,
            self.config.policy,
        )

    def prepare_attn(
        self, input_batch: InputBatch, cudagraph_mode: Any, block_tables: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Attention metadata over the physical lengths; in dummy runs, which hold nothing, over the given ones."""
        logical = input_batch.seq_lens, input_batch.seq_lens_cpu_upper_bound
        seq_lens, upper_bound = self.seq_lens[: logical[0].shape[0]], logical[1].clone()
        if input_batch is self.prepared:
            upper_bound.numpy()[: len(self.num_removed)] -= self.num_removed
        else:
            seq_lens.copy_(input_batch.seq_lens)
            self.bank_codes.fill_(-1)
        self.prepared = None
        # In place: a copy of the batch would take ten times as long as these few lines.
        input_batch.seq_lens, input_batch.seq_lens_cpu_upper_bound = seq_lens, upper_bound
        try:
            return super().prepare_attn(input_batch, cudagraph_mode, block_tables, *args, **kwargs)
        finally:  # sampling counts the tokens of the text
            input_batch.seq_lens, input_batch.seq_lens_cpu_upper_bound = logical

    # ------------------------------------------------------------------ compression

    def _compress(self, due: list[tuple[int, int]], block_table: Tensor) -> None:
        """Compress what is due, (row of the batch, slot): at once what has one ratio and shape."""
        groups: dict[tuple[Geometry, Shape], list[tuple[int, int, int]]] = {}
        for row, slot in due:
            geometry, event = self.rows.geometries[slot], self.rows.count_event(slot)
            assert geometry is not None
            groups.setdefault((geometry, geometry.shape(event)), []).append((row, slot, event))
            prompt = self.rows.num_prompt_tokens[slot]
            if event == 0 and (cut := geometry.prompt_shape(prompt)):
                whole = block_table[row : row + 1, : cut.num_candidates // self.block_size]
                self._compress_prompt(geometry, prompt, cut, slot, whole)
        width = block_table.shape[1]
        for (geometry, _), members in groups.items():
            rows, slots, done = zip(*members, strict=True)
            prompts = [self.rows.num_prompt_tokens[slot] for slot in slots]
            candidates = [
                row * width + block
                for row, prompt, event in zip(rows, prompts, done, strict=True)
                for block in geometry.candidate_blocks(prompt, event)
            ]
            starts = [self._ring_start(geometry, slot, event) for slot, event in zip(slots, done, strict=True)]
            sent = async_tensor_h2d([*starts, *candidates], dtype=torch.int32, device=self.device)
            ring_starts, index = sent.split((len(slots), len(candidates)))
            blocks = block_table.view(-1).index_select(0, index).view(len(slots), -1)
            self._compress_group(geometry, prompts, done, ring_starts, blocks)

    def _ring_start(self, geometry: Geometry, slot: int, event: int) -> int:
        return self.query_bank.ring_start(slot, oldest_slot(self.config, geometry, event))

    def _compress_group(
        self,
        geometry: Geometry,
        prompts: Sequence[int],
        done: Sequence[int],
        ring_starts: Tensor,
        candidates: Tensor,
    ) -> None:
        if self._fused:
            self._compress_kara(geometry, done[0], ring_starts, candidates)
        else:
            self._compress_generic(geometry, prompts, done, ring_starts, candidates)

    @cached_property
    def _fused(self) -> bool:
        """Whether the kernels do exactly what the method does."""
        if not isinstance(self.method, Kara) or not self.method.fused:
            return False
        return self.query_bank.queries.shape[-1] <= MOST_DIMS or not self.method.refits(num_kept=1)

    def _compress_kara(self, geometry: Geometry, event: int, ring_starts: Tensor, candidates: Tensor) -> None:
        assert self.cache is not None and isinstance(self.method, Kara)
        method, turn, num_kept = self.method, self._turn, geometry.shape(event).num_kept
        scores = window_scores(
            self.query_bank, ring_starts, candidates, self.cache, method.value_norm, method.keydiff_power,
            method.attention_floor, turn,
        )  # fmt: skip
        kept = select_chunks(scores, num_kept, method.max_chunk_size, method.chunk_fill)
        if method.refits(num_kept):
            ridges = (method.key_ridge, method.value_ridge)
            refit(self.query_bank, ring_starts, kept, candidates, self.cache, turn, *ridges)
        else:
            compact(kept, candidates, self.cache)

    @cached_property
    def _turn(self) -> Turn | None:
        """Of the stored queries, oldest first: their distances from the newest one are the same at every event."""
        assert isinstance(self.method, Kara)
        if self.rope is None:
            return None
        positions = torch.arange(self.config.num_queries, device=self.device) * self.config.query_stride
        # Tables as exact as the products: the kernel reads them for every head of every layer.
        dtype = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
        return self.method.turn(self.rope, positions, self.query_bank.shifts, self.query_bank.queries.shape[-1], dtype)

    def _compress_prompt(self, geometry: Geometry, prompt: int, cut: Shape, slot: int, blocks: Tensor) -> None:
        """Cut one prompt, by any method, some layers at a time: a long one is as many tokens as many windows."""
        assert self.cache is not None
        places = prompt_query_positions(self.config, geometry, prompt)
        queries = self.query_bank.of(self._ring_start(geometry, slot, 0))
        text = torch.arange(cut.num_candidates, device=self.device)
        size = max(1, _GENERIC_BATCH * geometry.num_candidates * len(self.layers) // cut.num_candidates)
        parts = []
        for start in range(0, len(self.layers), size):
            layers = slice(start, start + size)
            # Not the kernel, which would be compiled again for every length of a prompt.
            keys, values = gather_window_ref(blocks, self.cache.part(layers), self.dtype)
            window = Window(
                queries=queries[layers],
                query_positions=torch.from_numpy(places).to(self.device),
                keys=keys,
                values=values,
                positions=text.expand(len(keys), keys.shape[2], -1),
                layers=self.layer_indices[layers],
                query_shifts=self.query_bank.shifts,
                rope=self.rope,
            )
            parts.append(paired_rows(window, self.method.compress_prompt(window, cut.num_kept)))
        rows = [[t for t in (part.indices, part.keys, part.values) if t is not None] for part in parts]
        self._write(Kept(*map(torch.cat, zip(*rows, strict=True))), blocks)

    def _write(self, kept: Kept, blocks: Tensor) -> None:
        """Put the survivors, of `paired_rows`, in their place."""
        assert self.cache is not None
        if kept.keys is None or kept.values is None:
            indices = kept.indices.int().unflatten(0, (len(blocks), len(self.layers))).contiguous()
            compact(indices, blocks, self.cache)
        else:
            scatter_window(kept.keys, kept.values, blocks, self.cache)

    def _compress_generic(
        self,
        geometry: Geometry,
        prompts: Sequence[int],
        done: Sequence[int],
        ring_starts: Tensor,
        candidates: Tensor,
    ) -> None:
        """Any method, through dense copies of a few windows at a time."""
        assert self.cache is not None
        shape = geometry.shape(done[0])
        # A history with its window is as many tokens as many windows.
        size = max(1, _GENERIC_BATCH * geometry.num_candidates // shape.num_candidates)
        for start in range(0, len(done), size):
            part = slice(start, start + size)
            blocks, starts = candidates[part], ring_starts[part].long()
            window = self._window(geometry, prompts[part], done[part], blocks, starts)
            kept = self.method.compress(window, shape.num_kept)
            self._write(paired_rows(window, kept), blocks)
            if self.survivors is not None:
                positions = window.positions.gather(-1, kept.indices).to(self.survivors.dtype)
                positions = positions.unflatten(0, (len(blocks), len(self.layers)))
                slots = self.query_bank.row_of(starts)
                offsets = np.array([geometry.candidate_offset(event) for event in done[part]])
                for offset in np.unique(offsets):
                    same = np.nonzero(offsets == offset)[0].tolist()
                    self.survivors[slots[same], ..., offset : offset + shape.num_kept] = positions[same]

    def _window(
        self, geometry: Geometry, prompts: Sequence[int], done: Sequence[int], blocks: Tensor, starts: Tensor
    ) -> Window:
        """What a method sees of some requests, by their `ring_starts`; the batch is (request, layer)."""
        assert self.cache is not None
        keys, values = gather_window(blocks, self.cache, self.dtype)
        survivors = self.survivors
        if survivors is None:
            survivors = torch.empty(1, len(self.layers), keys.shape[2], 0, device=self.device).expand(
                self.max_num_reqs, -1, -1, -1
            )
        positions = [
            candidate_positions(geometry, prompt, event, survivors[slot])
            for prompt, event, slot in zip(prompts, done, self.query_bank.row_of(starts), strict=True)
        ]
        return Window(
            queries=self.query_bank.of(starts).transpose(0, 1).flatten(0, 1),
            query_positions=torch.from_numpy(query_positions(self.config, geometry, done[0])).to(self.device),
            keys=keys,
            values=values,
            positions=torch.cat(positions),
            layers=self.layer_indices.repeat(len(starts)),
            query_shifts=self.query_bank.shifts,
            rope=self.rope,
        )
