"""Compression inside vLLM's V2 model runner, the default on GPUs, under full CUDA graphs.

Whatever a captured graph reads keeps its address: the query bank, the codes that say where each token's queries go, the
physical sequence lengths, and vLLM's own gathered block tables, which are refilled every step and joined in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from kvllm.compression.rounding import Rounding
from kvllm.compression.worker import Layers, WorkerState
from kvllm.engine.attention import capture_queries, compressed_layers, store_with_queries
from kvllm.engine.cache_groups import compressed_group
from kvllm.engine.compat import is_quantized_kv_cache
from kvllm.engine.packed import PackedSurvivors
from kvllm.engine.rope import rope_of
from kvllm.engine.settings import Geometries, allowed_geometries, kv_config
from kvllm.engine.store_gpu import GpuStore
from kvllm.errors import UsageError
from kvllm.kernels.block_tables import join_segments
from kvllm.kernels.fused import fused_kernels, has_fused_kernels
from kvllm.kernels.paged import PagedCache
from kvllm.kernels.store_tokens import NewPairs, store_tokens
from kvllm.methods import make_method
from kvllm.support import model_state_reasons

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers

_LARGE_BANK = 0.05  # share of the device's memory from which on a max_num_seqs that was asked for is worth a thought


@cache
def compressing(cls: type) -> type:
    """`cls` with compression; UsageError for a model state that we do not know to be plain full attention."""
    for reason in model_state_reasons(cls):
        raise UsageError(f"KvLLM does not support {reason}.")
    return KvModelState


class KvModelState(DefaultModelState):
    """vLLM's model state, which also compresses due windows before a step and joins what its attention reads."""

    packed: PackedSurvivors | None = None

    group = 0  # of vLLM's KV cache groups the one that is compressed

    def __init__(self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        config = kv_config(vllm_config)
        assert config is not None
        self.config = config
        self.geometries = Geometries.of_engine(vllm_config)
        named_layers = compressed_layers(vllm_config)
        self.layers = list(named_layers.values())
        layer, numbers = self.layers[0], [extract_layer_index(name) for name in named_layers]
        shape = Layers(numbers, layer.num_heads, layer.num_kv_heads, layer.head_size, self.dtype)
        method = make_method(config)
        rope = rope_of(model, self.layers, vllm_config.model_config, device) if method.uses_rope else None
        fused = has_fused_kernels(method, layer.head_size)
        self.cache_dtype = vllm_config.cache_config.cache_dtype
        rounding = Rounding.from_config(config, self.geometries.block_size, layer.head_size, self.cache_dtype)
        packed_rows = PackedSurvivors.plan_rows(self.max_num_reqs, layer.num_kv_heads) if rounding is not None else 0
        self.compression = WorkerState(
            config, shape, rope, self.max_num_reqs, self.max_num_tokens, device, fused, packed_rows
        )
        self.seq_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.cache: PagedCache | None = None
        self.prepared: InputBatch | None = None  # the real batch that preprocess_state has planned
        self.num_removed = np.zeros(0, np.int64)
        if is_quantized_kv_cache(layer.kv_cache_dtype):
            capture_queries(self.layers, self._store, "cuda")  # what is quantised, vLLM writes itself
        else:
            store_with_queries(self.layers, self._store, "cuda")
        # Around the above: attention over packed survivors needs nothing of what a layer stores, and starts beside it.
        self.packed = PackedSurvivors(self.layers, rounding, self.dtype) if rounding is not None else None
        self._log_bank_size(torch.cuda.get_device_properties(device).total_memory)

    def _log_bank_size(self, total: int) -> None:
        size, seqs = self.compression.bank.num_bytes, self.max_num_reqs
        logger.info("KvLLM: %s, query bank of %.2f GiB for max_num_seqs=%d", self.config, size / 2**30, seqs)
        if size > _LARGE_BANK * total:
            logger.warning(
                "KvLLM: the query bank takes %.0f%% of the GPU's memory; a max_num_seqs below %d leaves more of it to "
                "the KV cache.",
                100 * size / total,
                seqs,
            )

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        geometry = self.geometries.of(new_req_data.sampling_params)
        self.compression.rows.set(req_index, geometry, new_req_data.prompt_len)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        block_size = self.geometries.block_size
        self.group = compressed_group(kv_cache_config, block_size)
        if block_tables.block_sizes[self.group] != block_size:
            raise UsageError(
                f"KvLLM needs block tables with blocks of {block_size} tokens; vLLM made "
                f"{block_tables.block_sizes[self.group]}."
            )
        pairs = [layer.kv_cache.transpose(1, 2).split(layer.head_size, dim=-1) for layer in self.layers]
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if pairs[0][0].dtype.itemsize == 1:
            # Queries reach the backend quantised too: their scale goes into the logits with the keys'.
            k_scale = [layer._k_scale_float * self._query_scale(layer) for layer in self.layers]
            v_scale = [layer._v_scale_float for layer in self.layers]
            scales = (torch.tensor(k_scale, device=self.device), torch.tensor(v_scale, device=self.device))
        self.attach(PagedCache.from_layers([k for k, _ in pairs], [v for _, v in pairs], *scales))

    def attach(self, cache: PagedCache) -> None:
        self.cache = cache
        state = self.compression
        store = GpuStore(
            self.config, state.bank, self.geometries.block_size, self.max_model_len, self._to_device,
            cache=cache, dtype=self.dtype,
        )  # fmt: skip
        fused, pack = fused_kernels(state.method, self.config, state.bank, cache, state.rope), None
        if self.packed is not None:
            self.packed.attach(cache, store.survivor_blocks, state.plan)
            pack = self.packed.pack
        state.attach(store, fused, pack, self.cache_dtype)
        state.warm_up(allowed_geometries(self.config, store.block_size, self.geometries.packed_tokens))

    def _to_device(self, numbers: list[int]) -> Tensor:
        return async_tensor_h2d(numbers, dtype=torch.int64, device=self.device)

    @staticmethod
    def _query_scale(layer: Any) -> float:
        return float(layer._q_scale_float) if layer.impl.supports_quant_query_input else 1.0

    def _store(self, layer: int, query: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor | None = None) -> None:
        if self.cache is None:  # a run that only measures memory
            return
        state = self.compression
        assert query.shape[0] <= len(state.codes)
        queries = query.view(-1, *state.bank.queries.shape[3:])
        pairs = None if slot_mapping is None else NewPairs(key, value, self.cache, slot_mapping)
        store_tokens(queries, state.bank, layer, state.codes, pairs)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: Any,
        num_computed_tokens: Tensor,
    ) -> None:
        """Compress what is due, then join the segments of the step's block tables and lengths. Real batches only."""
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        num_reqs, state = input_batch.num_reqs, self.compression
        rows, computed = input_batch.idx_mapping_np[:num_reqs], input_batch.num_computed_tokens_np[:num_reqs]
        self.num_removed = state.begin_step(rows, computed, input_batch.req_ids, block_tables[self.group])
        # Staged where the GPU can read it, which it may do after this step.
        size = state.plan_size + input_batch.num_tokens_after_padding
        staged = torch.empty(size, dtype=torch.int32, pin_memory=is_pin_memory_available())
        counts = input_batch.num_scheduled_tokens[:num_reqs]
        plan = state.write_plan(staged.numpy(), rows, computed, counts)
        if self.packed is not None:
            self.packed.write_plan(plan, counts)
        state.step[:size].copy_(staged, non_blocking=True)
        assert state.store is not None
        seq_lens = input_batch.seq_lens
        join_segments(
            block_tables[self.group], seq_lens, self.seq_lens[: seq_lens.shape[0]], state.store.survivor_blocks,
            state.plan, state.store.block_size, self.packed is not None,
        )  # fmt: skip
        self.prepared = input_batch

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Attention metadata over the physical lengths; in dummy runs, which hold nothing, over the given ones.

        Groups of local layers get theirs from a call of their own, with the lengths of the text.
        """
        seq_lens = self.seq_lens[: input_batch.seq_lens.shape[0]]
        upper_bound = input_batch.seq_lens_cpu_upper_bound.clone()
        if input_batch is self.prepared:
            upper_bound.numpy()[: len(self.num_removed)] -= self.num_removed
        else:
            seq_lens.copy_(input_batch.seq_lens)
            self.compression.codes.fill_(-1)
            if self.packed is not None and self.packed.attention is not None:
                self.packed.idle()
        self.prepared = None

        def prepare(groups: list[list[Any]]) -> dict[str, Any]:
            return super(KvModelState, self).prepare_attn(
                input_batch, cudagraph_mode, block_tables, slot_mappings, groups, *args, **kwargs
            )

        made = {}
        if len(attn_groups) > 1:
            made = prepare([[] if i == self.group else group for i, group in enumerate(attn_groups)])
            attn_groups = [group if i == self.group else [] for i, group in enumerate(attn_groups)]
        with physical_lengths(input_batch, seq_lens, upper_bound):
            return made | prepare(attn_groups)


@contextmanager
def physical_lengths(input_batch: Any, seq_lens: Tensor, upper_bound: Tensor) -> Iterator[None]:
    """While this is open the batch has these lengths; then its own again, since sampling counts the text's tokens.

    In place: a copy of the batch would take ten times as long.
    """
    logical = input_batch.seq_lens, input_batch.seq_lens_cpu_upper_bound
    input_batch.seq_lens, input_batch.seq_lens_cpu_upper_bound = seq_lens, upper_bound
    try:
        yield
    finally:
        input_batch.seq_lens, input_batch.seq_lens_cpu_upper_bound = logical
