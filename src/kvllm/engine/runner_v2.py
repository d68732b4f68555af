"""Compression inside vLLM's V2 model runner, the default on GPUs, under full CUDA graphs.

Whatever a captured graph reads keeps its address: the query bank, the slots that each token's query goes to, the
physical sequence lengths, and vLLM's own gathered block tables, which are refilled every step and shortened in place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from kvllm.engine.attention import store_with_queries
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
from kvllm.layout import Geometry, IntArray, Shape
from kvllm.methods import make_method
from kvllm.methods.base import Kept, Window
from kvllm.methods.kara import Kara, turn_distances
from kvllm.methods.rope import Turn
from kvllm.query_bank import QueryBank
from kvllm.query_ring import prompt_query_positions, query_positions

logger = init_logger(__name__)

# Rows of a step's plan, one int32 a request of the batch.
_PROTECTED, _EVENTS, _KEPT, _DROPPED, _FIXED, _CUT, _NUM_ROWS = range(7)
# Windows that a method without kernels of its own sees at once: dense copies of all layers are large.
_GENERIC_BATCH = 4

_LARGE_BANK = 0.05  # share of the device's memory from which on max_num_seqs is worth a thought

Places = tuple[int, ...]  # of each slot's query, as `query_positions` counts them


@cache
def compressing(cls: type) -> type:
    """`cls` with compression; ValueError for a model state that we do not know to be plain full attention."""
    if cls is not DefaultModelState:
        raise ValueError(f"KvLLM does not support models with {cls.__name__}: all layers must be full attention.")
    return KvModelState


@dataclass
class RequestRows:
    """What is known of the request in each of the runner's slots. Arrays [max_num_reqs]."""

    geometries: list[Geometry | None]
    num_prompt_tokens: IntArray
    protected: IntArray  # P', tokens
    first_event: IntArray  # computed tokens at event 0; past every length where the request is not compressed
    num_kept: IntArray  # K, tokens; 0 where the request is not compressed
    fixed_groups: IntArray  # groups that stay when the history is compressed
    prompt_cut: IntArray  # tokens of the prompt that event 0 takes out
    events: IntArray  # done
    dropped_groups: IntArray  # by those events

    @classmethod
    def empty(cls, max_num_reqs: int) -> RequestRows:
        return cls([None] * max_num_reqs, *(np.zeros(max_num_reqs, np.int64) for _ in range(8)))

    def set(self, row: int, geometry: Geometry | None, num_prompt_tokens: int) -> None:
        self.geometries[row] = geometry
        self.num_prompt_tokens[row] = num_prompt_tokens
        self.protected[row] = geometry.protected_len(num_prompt_tokens) if geometry else 0
        self.first_event[row] = geometry.event_at(num_prompt_tokens, 0) if geometry else np.iinfo(np.int64).max // 2
        self.num_kept[row] = geometry.num_kept if geometry else 0
        self.fixed_groups[row] = geometry.history_kept // geometry.num_kept if geometry else 0
        self.prompt_cut[row] = geometry.num_prompt_removed(num_prompt_tokens, 1) if geometry else 0
        self.events[row] = self.dropped_groups[row] = 0


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
        # Where no request is compressed unless it asks, sizes still come from the default configuration.
        self.interval = config.window_size if config.policy == "window" else config.budget_interval
        self.num_candidates = (
            config.window_size if config.policy == "window" else config.budget_size + config.budget_interval
        )
        named_layers = get_layers_from_vllm_config(vllm_config, Attention)
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
        self.turns: dict[Places, Turn] = {}
        # Text positions of survivors that will be candidates again, [max_num_reqs, num_layers, num_kv_heads, most of
        # them]; int32 holds them.
        self.survivors: Tensor | None = None
        most_survivors = config.budget_size if config.policy == "budget" else config.history_size
        if most_survivors and not self._fused:
            self.survivors = torch.zeros(
                self.max_num_reqs, len(self.layers), layer.num_kv_heads, most_survivors,
                dtype=torch.int32, device=device,
            )  # fmt: skip
        self.bank_codes = torch.full((self.max_num_tokens,), -1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.plan = torch.zeros(_NUM_ROWS, self.max_num_reqs, dtype=torch.int32, device=device)
        self.cache: PagedCache | None = None
        self.prepared: InputBatch | None = None  # the real batch that preprocess_state has planned
        self.num_removed = np.zeros(0, np.int64)
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
            places, done = self._places(geometry, event), np.full(1, event, np.int64)
            self._compress_group(geometry, np.ones(1, np.int64), done, places, row, blocks)

    @staticmethod
    def _query_scale(layer: Any) -> float:
        return float(layer._q_scale_float) if layer.impl.supports_quant_query_input else 1.0

    # ------------------------------------------------------------------ one step

    def _store(self, layer: int, query: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor | None) -> None:
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
        computed = input_batch.num_computed_tokens_np[:num_reqs].astype(np.int64)
        grown = computed - self.rows.first_event[slots]
        events = np.where(grown >= 0, grown // self.interval + 1, 0)
        if (due := events != self.rows.events[slots]).any():
            if (events > self.rows.events[slots] + 1).any():
                late = [input_batch.req_ids[i] for i in np.nonzero(events > self.rows.events[slots] + 1)[0]]
                raise RuntimeError(f"KvLLM: requests {late} went past a compression.")
            self._compress(np.nonzero(due)[0], slots, events, block_tables[0])
            self.rows.events[slots] = events
        self._plan_capture(input_batch, slots, computed)
        self._shorten(input_batch, slots, events, block_tables[0])
        self.prepared = input_batch

    def _plan_capture(self, input_batch: InputBatch, slots: IntArray, computed: IntArray) -> None:
        counts = input_batch.num_scheduled_tokens[: len(slots)].astype(np.int64)
        offsets, owners, ends = computed - self.rows.protected[slots], slots, computed + counts
        if (counts != 1).any():
            row = np.repeat(np.arange(len(slots)), counts)
            within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
            offsets, owners, ends = offsets[row] + within, slots[row], ends[row]
        # A chunk may be longer than the ring: of tokens for one slot only the newest counts.
        newest = offsets >= ends - self.rows.protected[owners] - self.query_bank.period
        stored = newest & (offsets >= 0) & (self.rows.num_kept[owners] > 0)
        plan = np.full(input_batch.num_tokens_after_padding, -1, np.int32)
        plan[: len(stored)][stored] = self.query_bank.codes(owners, offsets)[stored]
        async_tensor_h2d(plan, out=self.bank_codes[: len(plan)])

    def _shorten(self, input_batch: InputBatch, slots: IntArray, events: IntArray, block_table: Tensor) -> None:
        num_reqs = len(slots)
        plan = np.zeros((_NUM_ROWS, self.max_num_reqs), np.int32)
        plan[_PROTECTED, :num_reqs] = self.rows.protected[slots] // self.block_size
        plan[_EVENTS, :num_reqs] = events
        plan[_KEPT, :num_reqs] = np.maximum(self.rows.num_kept[slots] // self.block_size, 1)
        plan[_KEPT, num_reqs:] = 1
        plan[_DROPPED, :num_reqs] = self.rows.dropped_groups[slots]
        plan[_FIXED, :num_reqs] = self.rows.fixed_groups[slots]
        plan[_CUT, :num_reqs] = self.rows.prompt_cut[slots] // self.block_size
        async_tensor_h2d(plan, out=self.plan)
        num_padded = input_batch.seq_lens.shape[0]
        shorten_block_tables(
            block_table[:num_padded],
            input_batch.seq_lens,
            self.seq_lens[:num_padded],
            self.plan[_PROTECTED],
            self.plan[_EVENTS],
            self.plan[_KEPT],
            self.plan[_DROPPED],
            self.plan[_FIXED],
            self.plan[_CUT],
            self.num_candidates // self.block_size,
            self.interval // self.block_size,
            self.block_size,
            self.config.policy,
        )
        kept = self.rows.num_kept[slots]
        cut = self.rows.prompt_cut[slots] * (events > 0)
        self.num_removed = events * (self.num_candidates - kept) + self.rows.dropped_groups[slots] * kept + cut

    def prepare_attn(
        self, input_batch: InputBatch, cudagraph_mode: Any, block_tables: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Attention metadata over the physical lengths; in dummy runs, which hold nothing, over the given ones."""
        num_padded = input_batch.seq_lens.shape[0]
        upper_bound = input_batch.seq_lens_cpu_upper_bound.clone()
        if input_batch is self.prepared:
            upper_bound[: len(self.num_removed)] -= torch.from_numpy(self.num_removed).to(upper_bound.dtype)
        else:
            self.seq_lens[:num_padded].copy_(input_batch.seq_lens)
            self.bank_codes.fill_(-1)
        self.prepared = None
        physical = replace(input_batch, seq_lens=self.seq_lens[:num_padded], seq_lens_cpu_upper_bound=upper_bound)
        return super().prepare_attn(physical, cudagraph_mode, block_tables, *args, **kwargs)

    # ------------------------------------------------------------------ compression

    def _compress(self, due: IntArray, slots: IntArray, events: IntArray, block_table: Tensor) -> None:
        """Compress what is due in the batch's rows `due`: at once what has one ratio, shape, and places of queries."""
        groups: dict[tuple[Geometry, Shape, Places], list[int]] = {}
        for i in due:
            geometry, event = self.rows.geometries[slots[i]], int(events[i]) - 1
            assert geometry is not None
            groups.setdefault((geometry, geometry.shape(event), self._places(geometry, event)), []).append(int(i))
            self.rows.dropped_groups[slots[i]] = geometry.num_dropped_groups(event + 1)
            prompt = int(self.rows.num_prompt_tokens[slots[i]])
            if event == 0 and (cut := geometry.prompt_shape(prompt)):
                whole = block_table[i : i + 1, : cut.num_candidates // self.block_size]
                self._compress_prompt(geometry, prompt, cut, int(slots[i]), whole)
        for (geometry, _, places), rows in groups.items():
            batch = np.array(rows)
            prompts, done = self.rows.num_prompt_tokens[slots[batch]], events[batch] - 1
            blocks = self._candidate_blocks(geometry, prompts, done)
            index = async_tensor_h2d(np.concatenate([batch[:, None], blocks], axis=1), device=self.device)
            candidates = block_table[index[:, :1], index[:, 1:]]
            req_slots = async_tensor_h2d(slots[batch].astype(np.int32), device=self.device)
            self._compress_group(geometry, prompts, done, places, req_slots, candidates)

    def _compress_group(
        self,
        geometry: Geometry,
        prompts: IntArray,
        done: IntArray,
        places: Places,
        req_slots: Tensor,
        candidates: Tensor,
    ) -> None:
        if self._fused:
            self._compress_kara(geometry.shape(int(done[0])).num_kept, places, req_slots, candidates)
        else:
            self._compress_generic(geometry, prompts, done, places, req_slots, candidates)

    @staticmethod
    def _candidate_blocks(geometry: Geometry, prompts: IntArray, done: IntArray) -> IntArray:
        """Logical blocks [num_due, num_candidates / block_size] of the events `done`, which have one shape."""
        pairs = zip(prompts.tolist(), done.tolist(), strict=True)
        first = [geometry.candidate_start(prompt, event) // geometry.block_size for prompt, event in pairs]
        count = geometry.shape(int(done[0])).num_candidates // geometry.block_size
        logical = geometry.block_map(prompts, done, max(first) + count)
        return np.stack([row[f : f + count] for row, f in zip(logical, first, strict=True)])

    @property
    def _fused(self) -> bool:
        """Whether the kernels do exactly what the method does."""
        if not isinstance(self.method, Kara) or not self.method.fused:
            return False
        return self.query_bank.queries.shape[-1] <= MOST_DIMS or not self.method.refits(num_kept=1)

    def _compress_kara(self, num_kept: int, places: Places, req_slots: Tensor, candidates: Tensor) -> None:
        assert self.cache is not None and isinstance(self.method, Kara)
        method, turn = self.method, self._turn(places)
        scores = window_scores(
            self.query_bank, req_slots, candidates, self.cache, method.value_norm, method.keydiff_power,
            method.attention_floor, turn,
        )  # fmt: skip
        kept = select_chunks(scores.flatten(0, 2), num_kept, method.max_chunk_size, method.chunk_fill)
        kept = kept.view(*scores.shape[:3], -1)
        if method.refits(num_kept):
            ridges = (method.key_ridge, method.value_ridge)
            refit(self.query_bank, req_slots, kept, candidates, self.cache, turn, *ridges)
        else:
            compact(kept, candidates, self.cache)

    def _places(self, geometry: Geometry, event: int) -> Places:
        """Of the queries: the same at every event, or at every few (budget policy)."""
        return tuple(query_positions(geometry, event, self.config.query_stride, self.config.num_queries).tolist())

    def _turn(self, places: Places) -> Turn | None:
        """Of queries at these places."""
        assert isinstance(self.method, Kara)
        if self.rope is None:
            return None
        if places not in self.turns:
            positions = torch.tensor(places, device=self.device)
            distances = turn_distances(positions, self.query_bank.shifts, self.method.lookahead)
            # Tables as exact as the products: the kernel reads them for every head of every layer.
            dtype = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
            self.turns[places] = self.rope.turn(distances.unsqueeze(1), self.query_bank.queries.shape[-1], dtype)
        return self.turns[places]

    def _compress_prompt(self, geometry: Geometry, prompt: int, cut: Shape, slot: int, blocks: Tensor) -> None:
        """Cut one prompt, by any method, some layers at a time: a long one is as many tokens as many windows."""
        assert self.cache is not None
        places = prompt_query_positions(geometry, prompt, self.config.query_stride, self.config.num_queries)
        queries = self.query_bank.of(slot)
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
        prompts: IntArray,
        done: IntArray,
        places: Places,
        req_slots: Tensor,
        candidates: Tensor,
    ) -> None:
        """Any method, through dense copies of a few windows at a time."""
        assert self.cache is not None
        shape = geometry.shape(int(done[0]))
        # A history with its window is as many tokens as many windows.
        size = max(1, _GENERIC_BATCH * geometry.num_candidates // shape.num_candidates)
        for start in range(0, len(done), size):
            part = slice(start, start + size)
            blocks, slots = candidates[part], req_slots[part].long()
            window = self._window(geometry, prompts[part], done[part], blocks, slots, places)
            kept = self.method.compress(window, shape.num_kept)
            self._write(paired_rows(window, kept), blocks)
            if self.survivors is not None:
                positions = window.positions.gather(-1, kept.indices).to(self.survivors.dtype)
                positions = positions.unflatten(0, (len(blocks), len(self.layers)))
                offsets = np.array([geometry.candidate_offset(event) for event in done[part].tolist()])
                for offset in np.unique(offsets):
                    same = np.nonzero(offsets == offset)[0].tolist()
                    self.survivors[slots[same], ..., offset : offset + shape.num_kept] = positions[same]

    def _window(
        self, geometry: Geometry, prompts: IntArray, done: IntArray, blocks: Tensor, slots: Tensor, places: Places
    ) -> Window:
        """What a method sees of the requests `slots`; the batch is (request, layer)."""
        assert self.cache is not None
        keys, values = gather_window(blocks, self.cache, self.dtype)
        survivors = self.survivors
        if survivors is None:
            survivors = torch.empty(1, len(self.layers), keys.shape[2], 0, device=self.device).expand(
                self.max_num_reqs, -1, -1, -1
            )
        positions = [
            candidate_positions(geometry, prompt, event, survivors[slot])
            for prompt, event, slot in zip(prompts.tolist(), done.tolist(), slots, strict=True)
        ]
        return Window(
            queries=self.query_bank.of(slots).transpose(0, 1).flatten(0, 1),
            query_positions=torch.tensor(places, device=self.device),
            keys=keys,
            values=values,
            positions=torch.cat(positions),
            layers=self.layer_indices.repeat(len(slots)),
            query_shifts=self.query_bank.shifts,
            rope=self.rope,
        )
