"""Every place where KvLLM touches vLLM, declared once, with the reason and what would make it unnecessary.

`make check-seam` compares these declarations with our source, so that none is missing or stale, and with the
installed vLLM; `make check-seam VLLM=FOLDER` with any unpacked one. This module imports no vLLM.
"""

from __future__ import annotations

from kvllm.engine import patches
from kvllm.engine.log_sum_exp import PATCH as LOG_SUM_EXP_PATCH
from kvllm.engine.touch import RELEASES as RELEASES
from kvllm.engine.touch import Addition, Assignment, Import, Override, Patch, Read, Reliance, Touch

PUBLIC = "never: it is part of vLLM's public interface"
PLUGIN_STATE = "vLLM lets a plugin register a ModelState"
CPU_ON_V2 = "the CPU platform moves to the V2 runner"
PLUGIN_CONFIG = "vLLM lets a plugin check and amend a new configuration"
PLUGIN_REQUESTS = "vLLM lets a plugin validate requests with more than logits processors"
PLUGIN_SCHEDULER = "vLLM's scheduler lets a plugin end a chunk, and tells it when requests come and go"
PLUGIN_ATTENTION = "vLLM calls a plugin with a layer's queries, keys and values"
PLUGIN_USAGE = "vLLM lets a plugin add to the usage of a response"
PLUGIN_STATS = "vLLM reports a plugin's statistics"
FLOAT_ROPE = "rotary embeddings expose their frequencies in float32"

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler"
MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
ATTENTION = "vllm.model_executor.layers.attention.attention:Attention"
RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

# Each declaration as a paragraph:
# fmt: off
PATCHES = (
    Patch("vllm.engine.arg_utils:EngineArgs", "create_engine_config(self, usage_context=None, headless=False)",
        "the first place that has the whole configuration: check it, and choose our scheduler class", PLUGIN_CONFIG,
        wrap=patches.with_prepared_config),
    Patch("vllm.v1.engine.input_processor:InputProcessor",
        """process_inputs(self, request_id, prompt, params, supported_tasks, arrival_time=None, lora_request=None,
        tokenization_kwargs=None, trace_headers=None, priority=0, data_parallel_rank=None, resumable=False,
        session_id=None, kv_hints=None)""",
        "a request that cannot be served is refused with HTTP 400 before it is queued, and max_tokens is capped",
        PLUGIN_REQUESTS, wrap=patches.with_checked_request),
    Patch("vllm.v1.engine.input_processor:InputProcessor", "resolve_watermarking(self, params)",
        "the one method that both beam searches, offline and online, call with their parameters: warn that beam search "
        "is not compressed", "a beam search is one request of the engine", wrap=patches.with_noted_beam_search),
    Patch("vllm.v1.engine.core_client:MPClient", "_apply_ready_response(self, payload)",
        "a client adds up the pools of the engines that it manages, however many; a request must fit in one",
        "vLLM keeps the size of each engine's pool in the client", wrap=patches.with_noted_pool),
    Patch(ATTENTION, "get_kv_cache_spec(self, vllm_config)",
        "a layer asks for our cache spec, so the middle of a request can be freed",
        "vLLM lets a plugin choose a layer's spec", wrap=patches.with_compressed_spec),
    Patch("vllm.v1.worker.gpu.model_states", "resolve_model_state_cls(vllm_config, model)",
        "the V2 runner's per-request state is where windows are compacted and block tables shortened", PLUGIN_STATE,
        wrap=patches.with_compressing_model_state),
    Patch("vllm.v1.worker.cpu_model_runner:CPUModelRunner", "load_model(self, load_dummy_weights=False)",
        "the V1 runner has no per-request state to extend: ours is created beside the model", CPU_ON_V2,
        wrap=patches.with_adopted_layers),
    Patch(RUNNER_V1, "_update_states(self, scheduler_output)",
        "only here does the V1 runner learn which requests were preempted or finished, even in a step without tokens",
        CPU_ON_V2, wrap=patches.with_released_requests),
    Patch(RUNNER_V1, """_build_attention_metadata(self, num_tokens, num_reqs, max_query_len, num_tokens_padded=None,
        num_reqs_padded=None, ubatch_slices=None, logits_indices=None, max_num_sampled_tokens=None,
        use_spec_decode=False, for_cudagraph_capture=False, num_scheduled_tokens=None, slot_mappings=None)""",
        "after the slot mapping is computed and before attention is planned: compact what is due", CPU_ON_V2,
        wrap=patches.with_compression_step),
    Patch("vllm.v1.worker.cpu_model_runner:CPUModelRunner", "_zero_block_ids(self, block_ids)",
        "beside recurrent layers new blocks are zeroed, by the allocator's ids, in caches of smaller kernel blocks",
        "vLLM's CPU runner zeroes the kernel blocks of a block, as its GPU runners do",
        wrap=patches.with_zeroed_kernel_blocks),
    Patch("vllm.v1.worker.gpu_worker:Worker", "sample_tokens(self, grammar_output)",
        "the output of a step carries the seconds of its compressions to the scheduler", PLUGIN_STATS,
        wrap=patches.with_compression_seconds),
    Patch("vllm.v1.engine.async_llm:AsyncLLM", "_run_output_handler(self)",
        "called before a server's first request is added: gives its output processor what the next two patches need",
        PLUGIN_USAGE, wrap=patches.with_noted_front_end),
    Patch("vllm.v1.engine.output_processor:OutputProcessor",
        "add_request(self, request, prompt, parent_req=None, request_index=0, queue=None)",
        "what a request keeps and evicts is computed when it ends, from what is known here", PLUGIN_USAGE,
        wrap=patches.with_watched_request),
    Patch("vllm.v1.engine.output_processor:OutputProcessor", "_finish_request(self, req_state)",
        "the length of an answer is known: count what was kept, and log it with --enable-log-requests", PLUGIN_USAGE,
        wrap=patches.with_finished_request),
    Patch("vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion",
        "create_completion(self, request, raw_request=None)", "usage reports what was kept, if asked", PLUGIN_USAGE,
        wrap=patches.with_kv_usage),
    Patch("vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat",
        "create_chat_completion(self, request, raw_request=None)", "usage reports what was kept, if asked",
        PLUGIN_USAGE, wrap=patches.with_kv_usage),
    Patch("vllm.v1.metrics.loggers:StatLoggerManager",
        """__init__(self, vllm_config, engine_idxs=None, custom_stat_loggers=None, enable_default_loggers=True,
        aggregate_engine_logging=False, client_count=1)""",
        "our logger comes first, and only where KvLLM is configured; the entry point group vllm.stat_logger_plugins "
        "would turn statistics on for every engine, and has no effect on LLM", PLUGIN_STATS,
        wrap=patches.with_kv_metrics),
)

OVERRIDES = (
    Override("vllm.v1.kv_cache_interface:FullAttentionSpec", """max_memory_usage_bytes(self, vllm_config)
        merge(cls, specs) is_uniform_with_collection(self, kv_cache_specs)""",
        "start-up compares the pool with the longest request, which is compressed; layers that keep different shares "
        "of a window get KV cache groups of their own",
        "never: a registered spec is expected to say what it needs", ours="kvllm.engine.spec:KvSpec"),
    Override(MANAGER,
        """__init__(self, kv_cache_spec, block_pool, enable_caching, kv_cache_group_id, scheduler_block_size,
        dcp_world_size=1, pcp_world_size=1, needs_kv_cache_zeroing=False, max_admission_blocks_per_request=None)
        remove_skipped_blocks(self, request_id, processed_computed_tokens, num_prompt_tokens=None)
        pop_blocks_for_free(self, request_id)
        get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, total_computed_tokens,
        num_local_computed_tokens, num_tokens_main_model, apply_admission_cap=False, prefill_end=0)
        cache_blocks(self, request, num_tokens, retention_interval=None, *, replay_boundaries)""",
        "blocks are freed at events, admission counts the compressed size, and generated tokens are not hashed",
        "never: a registered spec brings its own manager", ours="kvllm.engine.spec:KvManager"),
    Override(SCHEDULER,
        """__init__(self, vllm_config, kv_cache_config, structured_output_manager, block_size, hash_block_size=None,
        mm_registry=MULTIMODAL_REGISTRY, include_finished_set=False, log_stats=False)
        add_request(self, request)
        _mamba_block_aligned_split(self, request, num_new_tokens, num_new_local_computed_tokens=0,
        num_external_computed_tokens=0)
        schedule(self, throttle_prefills=False)
        reset_prefix_cache(self, reset_running_requests=False, reset_connector=False)
        update_from_output(self, scheduler_output, model_runner_output)
        make_stats(self, spec_decoding_stats=None, kv_connector_stats=None, cudagraph_stats=None, perf_stats=None,
        ec_connector_stats=None)
        _preempt_request(self, request, timestamp, drop_stale_output=False)""",
        "a resumed request pauses at its events, admission leaves running requests their next interval, and what was "
        "compressed is reported",
        PLUGIN_SCHEDULER, ours="kvllm.engine.scheduler:CompressionMixin"),
    Override("vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        """__init__(self, vllm_config, model, encoder_cache, device)
        add_request(self, req_index, new_req_data)
        initialize_kv_cache(self, kv_cache_config, block_tables)
        preprocess_state(self, input_batch, block_tables, kv_cache_config, num_computed_tokens)
        prepare_attn(self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config,
        for_capture=False, ubatch_idx=0, model_specific_attn_metadata=None)""",
        "on GPUs windows are compacted before a step, and attention reads the physical lengths",
        "never: a model state is where vLLM puts work of this kind", ours="kvllm.engine.runner_v2:StateMixin"),
    Override("vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState",
        """__init__(self, vllm_config, model, encoder_cache, device)
        add_request(self, req_index, new_req_data)
        initialize_kv_cache(self, kv_cache_config, block_tables)
        preprocess_state(self, input_batch, block_tables, kv_cache_config, num_computed_tokens)
        prepare_attn(self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config,
        for_capture=False, ubatch_idx=0, model_specific_attn_metadata=None)""",
        "the same for models with recurrent layers, whose own preprocessing runs after ours",
        "never: a model state is where vLLM puts work of this kind", ours="kvllm.engine.runner_v2:StateMixin"),
    Override("vllm.v1.attention.backend:AttentionMetadataBuilder",
        "build(self, common_prefix_len, common_attn_metadata, fast_build=False)",
        "on CPUs attention metadata is built from the physical lengths", CPU_ON_V2,
        ours="kvllm.engine.attention:ShorteningBuilder"),
    Override("vllm.v1.attention.backend:AttentionBackend", "get_supported_kernel_block_sizes(kv_cache_spec=None)",
        "beside recurrent layers the allocator's blocks are large, and the kernels' must stay small",
        "vLLM lets the size of the kernels' blocks be chosen", ours="kvllm.engine.attention:KernelBlockBackend"),
    Override("vllm.v1.attention.backend:AttentionBackend", "get_builder_cls()", "the backend names the builder above",
        CPU_ON_V2, ours="kvllm.engine.attention:ShorteningBackend"),
    Override("vllm.v1.metrics.loggers:StatLoggerBase", """__init__(self, vllm_config, engine_index=0)
        record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0)
        log_engine_initialized(self)""", "benchmarks record every step", PUBLIC,
        ours="kvllm.measure.bench.worker:Logger"),
    Override("vllm.v1.metrics.loggers:AggregateStatLoggerBase", "__init__(self, vllm_config, engine_indexes)",
        "our metrics beside vLLM's", PUBLIC, ours="kvllm.engine.metrics:KvStatLogger"),
    Override("vllm.v1.metrics.loggers:StatLoggerBase", """record(self, scheduler_stats, iteration_stats,
        mm_cache_stats=None, engine_idx=0) log_engine_initialized(self)""", "our metrics beside vLLM's", PUBLIC,
        ours="kvllm.engine.metrics:KvStatLogger"),
)

IMPL_FORWARD = "forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, \
output_block_scale=None)"
IMPL_STORE = "do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)"
CAPTURES = "captures queries after RoPE; on GPUs also stores them with keys and values in one kernel"

ASSIGNMENTS = (
    Assignment("vllm.engine.arg_utils:EngineArgs", "max_num_seqs",
        "a smaller default on GPUs, from which vLLM derives other sizes", PLUGIN_CONFIG),
    Assignment("vllm.engine.arg_utils:EngineArgs", "model additional_config",
        "`kvllm generate` merges its options into vLLM's parsed arguments", PUBLIC),
    Assignment("vllm.config",
        """CacheConfig.block_size CacheConfig.user_specified_block_size ModelConfig.disable_cascade_attn
        SchedulerConfig.scheduler_cls""",
        "our default block size, no attention over unshortened tables, and our scheduler", PLUGIN_CONFIG),
    Assignment("vllm.v1.engine:EngineCoreRequest", "sampling_params",
        "`max_tokens` is capped in a copy: the caller may use its own parameters for other prompts", PLUGIN_REQUESTS),
    Assignment(SCHEDULER, "need_mamba_block_aligned_split",
        "sends every chunk through `_mamba_block_aligned_split`, where it is clipped at the next event",
        PLUGIN_SCHEDULER),
    Assignment(SCHEDULER, "schedule(self, throttle_prefills=False)",
        "`kvllm generate` counts the blocks that stock vLLM holds after every step",
        "vLLM reports the peak of the blocks in use"),
    Assignment("vllm.v1.core.kv_cache_manager:KVCacheManager", "watermark_blocks",
        "admission leaves running requests the blocks of their next interval",
        "vLLM asks a spec's manager how many blocks to keep free"),
    Assignment("vllm.v1.metrics.stats:SchedulerStats", "ec_connector_stats",
        "carries our report to the front end, where our logger takes it out again", PLUGIN_STATS),
    Assignment("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator",
        "cache_blocks(self, request, num_computed_tokens)",
        "managers of layers with a window cache no more blocks of a compressed request than have hashes, and a request "
        "that has nothing more to cache costs nothing",
        "a spec's manager decides what of a request is hashed and looked up"),
    Assignment("vllm.v1.request:Request", "_block_hasher skip_reading_prefix_cache",
        "blocks that will be overwritten are never hashed, nor found by hash",
        "a spec's manager decides what of a request is hashed and looked up"),
    Assignment(f"{OFFLOADING}:RequestOffloadState", "req",
        "of a compressed request the connector sees the prompt alone: resumed, it has full blocks without hashes",
        "the connector takes no more of a request than has hashes"),
    Assignment(ATTENTION, "attn_backend", "on CPUs, attention metadata is built by our subclass of the layer's backend",
        CPU_ON_V2),
    Assignment(ATTENTION, "sliding_window",
        "a window that no text outgrows is removed, or vLLM would give such layers a cache group of their own",
        "vLLM treats such a window as full attention"),
    Assignment(ATTENTION, "forward(self, query, key, value, output_shape=None, output_dtype=None)",
        "takes a layer's queries at several positions, in place of computing attention",
        FLOAT_ROPE),
    Assignment("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA", "_apply_lora_to_output(self, x, output)",
        "while a layer's rotation is measured, LoRA adds nothing: adapters are chosen only once there is a batch",
        "vLLM can run a layer without LoRA before there is a batch"),
    Assignment("vllm.v1.attention.backends.flash_attn:FlashAttentionImpl",
        f"{IMPL_FORWARD} {IMPL_STORE} sliding_window", CAPTURES, PLUGIN_ATTENTION),
    Assignment("vllm.v1.attention.backends.triton_attn:TritonAttentionImpl",
        f"{IMPL_FORWARD} {IMPL_STORE} sliding_window", CAPTURES, PLUGIN_ATTENTION),
    Assignment("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl", f"{IMPL_FORWARD} sliding_window",
        CAPTURES, PLUGIN_ATTENTION),
    Assignment("vllm.v1.worker.utils:AttentionGroup", "kernel_block_size",
        "a block table whose survivors have moved is in the kernels' blocks already, and is not mapped to them again",
        "vLLM's model state passes block tables in the kernels' blocks"),
)

ADDITIONS = (
    Addition("vllm.v1.engine.core:EngineCore", "kvllm_stats", "a utility method that the client's process can call",
        "vLLM lets a plugin register utility methods"),
    Addition("vllm.v1.outputs:ModelRunnerOutput", "kvllm_seconds", "seconds of a step's compressions", PLUGIN_STATS),
    Addition("vllm.v1.engine.output_processor:OutputProcessor", "kvllm_front_end",
        "the check of a server's requests, and whether it logs them", PLUGIN_USAGE),
    Addition("vllm.v1.engine.output_processor:RequestOutputCollector", "kvllm_watch",
        "what to count when the request ends", PLUGIN_USAGE),
    Addition("vllm.entrypoints.serve.engine.protocol:UsageInfo", "kv_cache",
        "what was kept and evicted: the response's pydantic model accepts any field", PLUGIN_USAGE),
    Addition(RUNNER_V1, "kv_compressor", "the V1 runner has no per-request state to extend", CPU_ON_V2),
    Addition("vllm.v1.engine.input_processor:InputProcessor", "kvllm_check",
        "checks requests, with settings that are final only once the engine has started", PLUGIN_REQUESTS),
    Addition("vllm.config:CacheConfig", "kvllm_smallest_pool",
        "the smallest pool among a client's engines, beside vLLM's sum of them",
        "vLLM keeps the size of each engine's pool in the client"),
)

READS = (
    Read(MANAGER, "_null_block", "replaces a freed block in the table, as vLLM does outside a sliding window",
        "the attribute becomes public"),
    Read("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry", "_ensure_registered",
        "registers our spec after vLLM's own, which it registers only while its registry is empty",
        "vLLM registers its own specs when the registry is imported"),
    Read("vllm.model_executor.layers.rotary_embedding", """base.RotaryEmbeddingBase._compute_cos_sin_cache
        phi3_long_rope_scaled_rope.Phi3LongRoPEScaledRotaryEmbedding._compute_cos_sin_cache""",
        "the frequencies of a model's rotary embedding, which its table has only in the model's dtype", FLOAT_ROPE),
    Read("vllm.model_executor.layers.attention.attention:set_default_quant_scales",
        "_q_scale_float _k_scale_float _v_scale_float", "scales of an fp8 cache, read once on the host",
        "a layer exposes its scales"),
    Read("vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput", "_model_runner_output",
        "an output that is copied to the host asynchronously carries the seconds as well", CPU_ON_V2),
    Read("vllm.v1.worker.gpu.async_utils:AsyncOutput", "model_runner_output",
        "an output that is copied to the host asynchronously carries the seconds as well", PLUGIN_STATS),
    Read(f"{OFFLOADING}:OffloadingConnectorScheduler", "_req_status", "what the connector knows of a request",
        "the connector takes no more of a request than has hashes"),
    Read(ATTENTION, "layer_name", "numbers the layers", PUBLIC),
    Read("vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder", "_set_isa_to_layers.isa",
        "the instruction set that a layer's cache is packed for", CPU_ON_V2),
    Read("vllm.v1.engine",
        "core_client.SyncMPClient.call_utility(self, method, *args) core_client.InprocClient.engine_core "
        "core.EngineCore.scheduler", "statistics from whichever process the engine core runs in", PLUGIN_STATS),
)

RELIANCES = (
    Reliance("vllm.v1.worker.gpu.block_table:BlockTables",
        "gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None)",
        "refills the gathered tables in every step, so that shortening them in place loses nothing", PLUGIN_STATE,
        releases=("0.32",)),
    Reliance("vllm.v1.worker.gpu.block_table:BlockTables",
        "gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None, num_computed_tokens=None)",
        "as in 0.32; the computed tokens only mask sliding-window groups, which are not compressed", PLUGIN_STATE,
        releases=("0.33",)),
    Reliance("vllm.v1.worker.gpu.attn_utils",
        """build_attn_metadata(attn_groups, num_reqs, num_tokens, query_start_loc_gpu, query_start_loc_cpu,
        max_query_len, seq_lens, max_seq_len, block_tables, slot_mappings, kv_cache_config,
        seq_lens_cpu_upper_bound=None, dcp_local_seq_lens=None, dcp_local_seq_lens_cpu_upper_bound=None,
        positions=None, is_prefilling=None,
        mm_req_doc_ranges=None, model_specific_attn_metadata=None, for_cudagraph_capture=False, causal=True,
        rswa_prefix_lens=None, ubatch_idx=0, fast_prefill=None, req_idx=None)""",
        "asks each attention group for its metadata, where ours builds them from the physical lengths",
        "vLLM passes sequence lengths to `build_attn_metadata` group by group"),
    Reliance("vllm.v1.worker.utils:AttentionGroup",
        """build_metadata(self, common_attn_metadata, ubatch_idx=0, common_prefix_len=0, **kwargs)
        build_metadata_for_cudagraph_capture(self, common_attn_metadata, ubatch_idx=0)""",
        "all that `build_attn_metadata` builds with: a group of ours passes them the physical lengths",
        "vLLM passes sequence lengths to `build_attn_metadata` group by group"),
    Reliance("vllm.v1.core.kv_cache_utils", "_get_kv_cache_groups_uniform_page_size(kv_cache_spec)",
        "how vLLM groups the layers: `kvllm plan` and the front end predict it, and the scheduler compares",
        "vLLM tells its front end its KV cache groups", releases=("0.32",)),
    Reliance("vllm.v1.core.kv_cache_planning", "_get_kv_cache_groups_uniform_page_size(kv_cache_spec)",
        "as in 0.32, in another module", "vLLM tells its front end its KV cache groups", releases=("0.33",)),
    Reliance("vllm.v1.core.block_pool:BlockPool", "free_blocks(self, ordered_blocks)",
        "skips null blocks, which a compressed request has in the middle of its table",
        "never: sliding windows rely on it as well"),
    Reliance("vllm.v1.core.kv_cache_manager:KVCacheManager",
        """allocate_slots(self, request, num_new_tokens, num_new_computed_tokens=0, new_computed_blocks=None,
        num_lookahead_tokens=0, num_external_computed_tokens=0, delay_cache_blocks=False, num_encoder_tokens=0,
        full_sequence_must_fit=False, reserved_blocks=0, has_scheduled_reqs=True, skip_zeroing_group_ids=())""",
        "removes skipped blocks before it allocates, and distinguishes admission from growth",
        "never: this is how the pool sees what a spec's manager frees"),
    Reliance("vllm.v1.kv_offload.cpu.gpu_worker:SingleDirectionOffloadingHandler",
        "transfer_async(self, job_id, src_spec, dst_spec)",
        "copies wait for the compute stream, so a load fills a block that an event emptied only after the event",
        "never: copies are ordered with the writes of the blocks that they read and fill"),
    Reliance(SCHEDULER, """_update_request_with_output(self, request, new_token_ids, is_stale=False)
        update_from_output(self, scheduler_output, model_runner_output)""",
        "when computed tokens are counted and blocks are cached, on which events in scheduler and worker depend",
        PLUGIN_SCHEDULER),
    Reliance("vllm.v1.core.sched.async_scheduler:AsyncScheduler", "_update_after_schedule(self, scheduler_output)",
        "asynchronous scheduling counts tokens before they are sampled", PLUGIN_SCHEDULER),
    Reliance("vllm.platforms.cpu:CpuPlatform",
        "check_and_update_config(cls, vllm_config) update_block_size_for_backend(cls, vllm_config)",
        "keep a block size that the user, or KvLLM, chose; 0.33 sets its own in the second, not in the first",
        PLUGIN_CONFIG),
)

IMPORTS = (
    Import("vllm._custom_ops", "cpu_attn_reshape_and_cache",
        "writes survivors to the CPU's cache, and reveals how it is packed", CPU_ON_V2),
)

# fmt: on
SEAM: tuple[Touch, ...] = (
    *PATCHES,
    LOG_SUM_EXP_PATCH,
    *OVERRIDES,
    *ASSIGNMENTS,
    *ADDITIONS,
    *READS,
    *RELIANCES,
    *IMPORTS,
)

# The vLLM classes of objects that our source does not annotate with them, by module and expression. The checker looks
# up every member that we use of them, and whether the functions among these take the arguments that we pass.
OBJECTS = {
    "kvllm.engine.attention": {"layer": ATTENTION, "layer.impl": "vllm.v1.attention.backend:AttentionImpl"},
    "kvllm.engine.offloading": {"status": f"{OFFLOADING}:RequestOffloadState"},
    "kvllm.engine.packed": {"layer.impl": "vllm.v1.attention.backend:AttentionImpl"},
    "kvllm.engine.rope": {"layer": ATTENTION, "config": "vllm.config:ModelConfig"},
    "kvllm.engine.runner_v1": {
        "runner": RUNNER_V1,
        "self.runner": RUNNER_V1,
        "layer": ATTENTION,
        "each": ATTENTION,
        "request": "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "batch.block_table[self.group]": "vllm.v1.worker.block_table:BlockTable",
    },
    "kvllm.engine.runner_v2": {
        "layer": ATTENTION,
        "layer.impl": "vllm.v1.attention.backend:AttentionImpl",
        "input_batch": "vllm.v1.worker.gpu.input_batch:InputBatch",
        "block_tables": "vllm.v1.worker.gpu.block_table:BlockTables",
        "new_req_data": "vllm.v1.core.sched.output:NewRequestData",
        "self._group": "vllm.v1.worker.utils:AttentionGroup",
    },
    "kvllm.engine.scheduler": {"pool": "vllm.v1.core.block_pool:BlockPool"},
    "kvllm.cli.generate": {"scheduler": SCHEDULER, "pool": "vllm.v1.core.block_pool:BlockPool"},
    "kvllm.support": {
        "layer": ATTENTION,
        "vllm_config": "vllm.config:VllmConfig",
        "model": "vllm.config:ModelConfig",
        "cache": "vllm.config:CacheConfig",
        "parallel": "vllm.config:ParallelConfig",
    },
    "kvllm.engine.arguments": {"command": "vllm.entrypoints.cli.serve:ServeSubcommand"},
    "kvllm.measure.bench.worker": {
        "scheduler_stats": "vllm.v1.metrics.stats:SchedulerStats",
        "iteration_stats": "vllm.v1.metrics.stats:IterationStats",
        "s": "vllm.v1.engine.output_processor:RequestState",
        "s.stats": "vllm.v1.metrics.stats:RequestStateStats",
        "self.llm": "vllm.v1.engine.llm_engine:LLMEngine",
        "engine.llm": "vllm.v1.engine.llm_engine:LLMEngine",
    },
}


def apply_patches() -> None:
    """Apply every patch; can run twice."""
    for patch in PATCHES:
        patch.apply()
