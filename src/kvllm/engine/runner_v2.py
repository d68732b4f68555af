"""Compression in vLLM's V2 model runner, the default on GPUs, under full CUDA graphs.

All that a captured graph reads keeps its address: the query bank, the codes that say where each token's queries are
stored, the physical sequence lengths, and vLLM's gathered block tables, which are refilled every step and joined in
place.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.buffer_utils import UvaBufferPool
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from kvllm.checks import allowed_geometries
from kvllm.compression.rounding import Rounding
from kvllm.compression.stopwatch import Stopwatch
from kvllm.compression.worker import Layers, WorkerState
from kvllm.config import KvConfig
from kvllm.engine.attention import (
    capture_queries,
    compressed_layers,
    in_kernel_blocks,
    in_part,
    kernel_block_backend,
    store_with_queries,
)
from kvllm.engine.cache_groups import compressed_block_size, compressed_groups
from kvllm.engine.compat import is_quantized_kv_cache
from kvllm.engine.packed import PackedSurvivors
from kvllm.engine.rope import rope_for
from kvllm.engine.settings import Geometries, kv_config, request_method
from kvllm.engine.store_gpu import GpuStore
from kvllm.errors import UsageError
from kvllm.kernels.block_tables import join_segments
from kvllm.kernels.fused import fused_kernels, has_fused_kernels
from kvllm.kernels.paged import PagedCache
from kvllm.kernels.store_tokens import NewPairs, store_tokens
from kvllm.methods import make_methods
from kvllm.methods.rope import Rope
from kvllm.support import model_state_reasons

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers

_LARGE_BANK = 0.05  # share of the device's memory above which a warning suggests a lower max_num_seqs


@cache
def compressing(cls: type) -> type:
    """`cls` with compression; UsageError for a model state that is not supported."""
    for reason in model_state_reasons(cls):
        raise UsageError(f"KvLLM does not support {reason}.")
    return KvModelState if cls is DefaultModelState else KvHybridModelState


# A model state for the type checker; at run time the classes below combine the mixin with one.
Base: Any = DefaultModelState if TYPE_CHECKING else object


class Part:
    """The compressed layers of one KV cache group, which have the same retention ratio (`KvConfig.parts`).

    group: the index of that group, once vLLM has made its groups
    """

    packed: PackedSurvivors | None = None

    group = 0
    blocks_per_block = 1  # kernel blocks per allocator block
    kernel_table: Tensor | None = None  # [max_num_reqs, most kernel blocks], if the two block sizes differ

    def __init__(
        self,
        state: DefaultModelState,
        config: KvConfig,
        layers: dict[str, Any],
        rope: Rope | None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """config, rope: of these layers; layers: by name; stopwatch: as in `WorkerState`"""
        self.config = config
        self.device, self.dtype = state.device, state.dtype
        self.layers = list(layers.values())
        self.geometries = Geometries.of_engine(state.vllm_config)
        block_size, layer = self.geometries.block_size, self.layers[0]
        numbers = [extract_layer_index(name) for name in layers]
        shape = Layers(numbers, layer.num_heads, layer.num_kv_heads, layer.head_size, self.dtype)
        fused = all(has_fused_kernels(method, layer.head_size) for method in make_methods(config).values())
        self.cache_dtype = state.vllm_config.cache_config.cache_dtype
        rounding = Rounding.from_config(config, block_size, layer.head_size, self.cache_dtype)
        num_reqs = state.max_num_reqs
        packed_rows = PackedSurvivors.plan_rows(num_reqs, layer.num_kv_heads) if rounding is not None else 0
        self.compression = WorkerState(
            config, shape, rope, num_reqs, state.max_num_tokens, self.device, fused, packed_rows, stopwatch
        )
        self.seq_lens = torch.zeros(num_reqs, dtype=torch.int32, device=self.device)
        self.cache: PagedCache | None = None
        self.num_removed = np.zeros(0, np.int64)
        if state.vllm_config.model_config.is_hybrid:
            for each in self.layers:
                each.attn_backend = kernel_block_backend(each.attn_backend, block_size)
        # Wrapped by the writes to the cache below, which its attention may read.
        self.packed = PackedSurvivors(self.layers, rounding, self.dtype) if rounding is not None else None
        if is_quantized_kv_cache(layer.kv_cache_dtype):
            capture_queries(self.layers, self._store, "cuda")  # vLLM itself quantises and writes keys and values
        else:
            store_with_queries(self.layers, self._store, "cuda")
        if self.packed is not None:
            self.packed.start_first()

    @cached_property
    def host(self) -> npt.NDArray[np.int32]:
        """A step's plan and codes, as they are written."""
        return np.zeros(len(self.compression.step), np.int32)

    @cached_property
    def staged(self) -> UvaBufferPool:
        """Pinned buffers for `host`, one for each step in flight, since the GPU may read it after the step."""
        return UvaBufferPool(len(self.host), torch.int32)

    def set_group(self, group: int, allocator_block_size: int, block_table: Tensor) -> None:
        """Set the KV cache group.

        block_table: [max_num_reqs, any], vLLM's block table of that group
        """
        self.group = group
        self.blocks_per_block = allocator_block_size // self.geometries.block_size
        if self.blocks_per_block > 1:
            num_reqs, num_blocks = block_table.shape
            shape = (num_reqs, num_blocks * self.blocks_per_block)
            self.kernel_table = torch.zeros(shape, dtype=torch.int32, device=self.device)

    def paged_cache(self) -> PagedCache:
        """The layers' KV caches, once vLLM has allocated them."""
        pairs = [layer.kv_cache.transpose(1, 2).split(layer.head_size, dim=-1) for layer in self.layers]
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if pairs[0][0].dtype.itemsize == 1:
            # Queries reach the backend quantised, too: their scale multiplies the logits, as the keys' does.
            k_scale = [layer._k_scale_float * self._query_scale(layer) for layer in self.layers]
            v_scale = [layer._v_scale_float for layer in self.layers]
            scales = (torch.tensor(k_scale, device=self.device), torch.tensor(v_scale, device=self.device))
        return PagedCache.from_layers([k for k, _ in pairs], [v for _, v in pairs], *scales)

    def attach(self, cache: PagedCache, max_model_len: int) -> None:
        self.cache = cache
        state = self.compression
        store = GpuStore(
            self.config, state.bank, self.geometries.block_size, max_model_len, self._to_device,
            cache=cache, dtype=self.dtype,
        )  # fmt: skip
        store.allocator_block_size = self.blocks_per_block * store.block_size
        fused = {
            name: fused_kernels(method, self.config, state.bank, cache, state.rope_for(method))
            for name, method in state.methods.items()
        }
        pack = None
        if self.packed is not None:
            self.packed.attach(cache, store.survivor_blocks, state.plan)
            pack = self.packed.pack
        state.attach(store, fused, pack, self.cache_dtype)
        state.warm_up(allowed_geometries(self.config, store.block_size, self.geometries.packed_tokens))
        if cache.k_scale is None:
            self._compile_store(cache)

    def _compile_store(self, cache: PagedCache) -> None:
        """Compile what steps launch to store tokens, so that the first of them does not wait for it.

        Not for a quantised cache, to which vLLM itself writes keys and values.
        """
        bank, not_stored = self.compression.bank, torch.full((1,), -1, device=self.device)
        shapes = (1, bank.num_heads, bank.head_dim), (1, cache.num_kv_heads, bank.head_dim)
        query, pair = (torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes)
        for overlap in {False, self.packed is not None and self.packed.overlap}:
            store_tokens(query, bank, 0, not_stored.int(), NewPairs(pair, pair, cache, not_stored), overlap)

    def _to_device(self, numbers: list[int]) -> Tensor:
        return async_tensor_h2d(numbers, dtype=torch.int64, device=self.device)

    @staticmethod
    def _query_scale(layer: Any) -> float:
        return float(layer._q_scale_float) if layer.impl.supports_quant_query_input else 1.0

    def _store(self, layer: int, query: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor | None = None) -> None:
        if self.cache is None:  # vLLM's memory profiling run
            return
        state = self.compression
        assert query.shape[0] <= len(state.codes)
        queries = query.view(-1, state.bank.num_heads, state.bank.head_dim)
        pairs = None if slot_mapping is None else NewPairs(key, value, self.cache, slot_mapping)
        store_tokens(queries, state.bank, layer, state.codes, pairs, self.packed is not None and self.packed.follows)

    def begin_step(self, input_batch: InputBatch, block_table: Tensor) -> None:
        """Compress what is due, then join the two segments in the step's block table and sequence lengths.

        block_table: [num_reqs, any], the group's; joined in place, or in `kernel_table`
        """
        num_reqs, state = input_batch.num_reqs, self.compression
        table = in_kernel_blocks(block_table, self.blocks_per_block, self.kernel_table)
        rows, computed = input_batch.idx_mapping_np[:num_reqs], input_batch.num_computed_tokens_np[:num_reqs]
        self.num_removed = state.begin_step(rows, computed, input_batch.req_ids, table)
        size = state.plan_size + input_batch.num_tokens_after_padding
        counts = input_batch.num_scheduled_tokens[:num_reqs]
        plan = state.write_plan(self.host[:size], rows, computed, counts)
        if self.packed is not None:
            lengths = computed + counts - self.num_removed
            self.packed.write_plan(plan, counts, lengths)
        self.staged.copy_to_gpu(self.host[:size], out=state.step[:size])
        assert state.store is not None
        seq_lens = input_batch.seq_lens
        join_segments(
            table, seq_lens, self.seq_lens[: seq_lens.shape[0]], state.store.survivor_blocks,
            state.plan, state.store.block_size, self.packed is not None,
        )  # fmt: skip

    def physical(self, input_batch: InputBatch, is_real: bool, attn_groups: list[Any]) -> list[Any]:
        """The part's attention groups, with its physical lengths; in a dummy run with the batch's own."""
        seq_lens = self.seq_lens[: input_batch.seq_lens.shape[0]]
        if is_real:
            upper_bound = input_batch.seq_lens_cpu_upper_bound.numpy().copy()
            upper_bound[: len(self.num_removed)] -= self.num_removed
            return [PhysicalGroup(group, seq_lens, upper_bound) for group in attn_groups]
        seq_lens.copy_(input_batch.seq_lens)
        self.compression.codes.fill_(-1)
        if self.packed is not None and self.packed.attention is not None:
            self.packed.idle()
        return [PhysicalGroup(group, seq_lens, None) for group in attn_groups]

    def tables(self, block_tables: tuple[Tensor, ...], attn_groups: list[Any]) -> tuple[Tensor, ...]:
        """A step's block tables, in kernel blocks for the part's own attention groups `attn_groups`."""
        if self.kernel_table is None:
            return block_tables
        tables = list(block_tables)
        tables[self.group] = self.kernel_table[: len(block_tables[self.group])]
        for attn_group in attn_groups:
            attn_group.kernel_block_size = None  # the table is in kernel blocks already
        return tuple(tables)


class StateMixin(Base):
    """Adds compression to a model state: due windows are compressed before a step, and the segments that its attention
    reads are joined.

    parts: one for each ratio (`KvConfig.parts`); in most cases one, with all full-attention layers
    """

    parts: list[Part]

    def __init__(self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        config = kv_config(vllm_config)
        assert config is not None
        self.config = config
        self.geometries = Geometries.of_engine(vllm_config)
        named_layers = compressed_layers(vllm_config)
        self.parts = []
        for number, part_config in enumerate(config.parts):
            layers = {name: layer for name, layer in named_layers.items() if in_part(config, number, name)}
            rope = rope_for(config, model, list(layers.values()), vllm_config.model_config, device)
            stopwatch = self.compression.stopwatch if self.parts else None
            self.parts.append(Part(self, part_config, layers, rope, stopwatch))
        self.prepared: InputBatch | None = None  # the real batch for which preprocess_state was called
        self._log_bank_size(torch.cuda.get_device_properties(device).total_memory)

    @property
    def compression(self) -> WorkerState:
        """The first part's state, whose stopwatch all parts share."""
        return self.parts[0].compression

    def _log_bank_size(self, total: int) -> None:
        size, seqs = sum(part.compression.bank.num_bytes for part in self.parts), self.max_num_reqs
        logger.info("KvLLM: %s, query bank of %.2f GiB for max_num_seqs=%d", self.config, size / 2**30, seqs)
        if size > _LARGE_BANK * total:
            logger.warning(
                "KvLLM: the query bank takes %.0f%% of the GPU's memory; use a max_num_seqs below %d to leave more to "
                "the KV cache.",
                100 * size / total,
                seqs,
            )

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        geometry = self.geometries.of(new_req_data.sampling_params)
        method = request_method(self.config, new_req_data.sampling_params)
        for number, part in enumerate(self.parts):
            own = None if geometry is None else geometry.groups[number]
            part.compression.rows.set(req_index, own, new_req_data.prompt_len, method)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        block_size, num_parts = self.geometries.block_size, len(self.parts)
        groups = compressed_groups(kv_cache_config, block_size, num_parts)
        allocator_block_size = compressed_block_size(kv_cache_config, block_size, num_parts)
        for part, group in zip(self.parts, groups, strict=True):
            if block_tables.block_sizes[group] != allocator_block_size:
                raise UsageError(
                    f"KvLLM needs block tables with blocks of {allocator_block_size} tokens, but vLLM made blocks of "
                    f"{block_tables.block_sizes[group]}."
                )
            part.set_group(group, allocator_block_size, block_tables.input_block_tables[group])
            part.attach(part.paged_cache(), self.max_model_len)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: Any,
        num_computed_tokens: Tensor,
    ) -> None:
        """Compress what is due, then join the segments in block tables and lengths. Called for real batches only."""
        for part in self.parts:
            part.begin_step(input_batch, block_tables[part.group])
        self.prepared = input_batch
        # After the events, since it may write to blocks that they have emptied.
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)

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
        """Attention metadata, in the parts' groups with the physical lengths; in dummy runs with the batch's own."""
        is_real, self.prepared = input_batch is self.prepared, None
        groups = list(attn_groups)
        for part in self.parts:
            own = attn_groups[part.group]
            block_tables = part.tables(block_tables, own)
            groups[part.group] = part.physical(input_batch, is_real, own)
        return super().prepare_attn(input_batch, cudagraph_mode, block_tables, slot_mappings, groups, *args, **kwargs)


class KvModelState(StateMixin, DefaultModelState):
    """The state of a model that has attention layers only."""


class KvHybridModelState(StateMixin, MambaHybridModelState):
    """The state of a model that also has recurrent layers, which are left to vLLM."""


class PhysicalGroup:
    """An attention group of vLLM whose metadata is built from the physical lengths.

    seq_lens:    [at least num_reqs] int32, on the device; a captured graph reads its address
    upper_bound: [at least num_reqs] int32; None: the batch's own
    """

    def __init__(self, group: Any, seq_lens: Tensor, upper_bound: npt.NDArray[np.int32] | None) -> None:
        self._group = group
        self._seq_lens, self._upper_bound = seq_lens, upper_bound

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def build_metadata(self, common: CommonAttentionMetadata, *args: Any, **kwargs: Any) -> Any:
        most = {} if self._upper_bound is None else {"max_seq_len": int(self._upper_bound[: common.num_reqs].max())}
        return self._group.build_metadata(self._with_lengths(common, **most), *args, **kwargs)

    def build_metadata_for_cudagraph_capture(self, common: CommonAttentionMetadata, *args: Any) -> Any:
        return self._group.build_metadata_for_cudagraph_capture(self._with_lengths(common), *args)

    def _with_lengths(self, common: CommonAttentionMetadata, **others: int) -> CommonAttentionMetadata:
        bound = common.seq_lens_cpu_upper_bound
        if self._upper_bound is not None:
            bound = torch.from_numpy(self._upper_bound[: common.num_reqs])
        seq_lens = self._seq_lens[: common.num_reqs]
        return common.replace(seq_lens=seq_lens, seq_lens_cpu_upper_bound=bound, **others)
