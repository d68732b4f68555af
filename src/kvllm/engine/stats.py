"""Statistics of an engine's blocks and compressions, available in the client's process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from vllm import LLM


class EngineStats(TypedDict):
    """Counts since the engine started. Blocks are KV blocks of `block_size` tokens, in all KV cache groups.

    What a preempted request recomputes counts again.
    """

    block_size: int
    num_kv_blocks: int
    free_kv_blocks: int
    peak_kv_blocks: int
    num_windows_compressed: int
    num_blocks_freed: int
    num_prompts_cut: int  # to their `prompt_budget`
    num_tokens_kept: int  # that compressions read and kept
    num_tokens_evicted: int
    num_held_back: int  # requests not admitted because running ones will need the free blocks
    num_preemptions: int
    num_running: int
    num_logical_tokens: int  # computed tokens of the running requests
    num_physical_tokens: int  # of these, the tokens in the cache
    compression_seconds: float  # on the device


def core_stats(engine_core: Any, reset_peak: bool = False) -> EngineStats:
    """`EngineStats` of an engine core; becomes a utility method of the core."""
    return engine_core.scheduler.engine_stats(reset_peak)


def engine_stats(llm: LLM, reset_peak: bool = False) -> EngineStats:
    """`EngineStats` of an `LLM` with KvLLM configured, whether its engine core runs in this process or not.

    reset_peak: restart `peak_kv_blocks` after this reading
    """
    client = llm.llm_engine.engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility("kvllm_stats", reset_peak)
    return core_stats(client.engine_core, reset_peak)  # type: ignore[attr-defined]


def add_seconds(worker: Any, output: Any) -> None:
    """Attach the seconds that a worker's compressions took to the output of its step."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    runner = worker.model_runner
    state = getattr(getattr(runner, "kv_compressor", None), "state", None)  # the V1 runner's
    if state is None:
        state = getattr(getattr(runner, "model_state", None), "compression", None)  # the V2 runner's
    if state is None:
        return
    if output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:  # the latter is shared by all steps
        state.stopwatch.collect()  # so that a pipeline stage without outputs does not accumulate events
        return
    if not (seconds := state.stopwatch.take()):
        return
    for name in ("model_runner_output", "_model_runner_output"):  # the wrapped output, if it is copied asynchronously
        output = getattr(output, name, output)
    output.kvllm_seconds = seconds


def take_seconds(output: Any) -> float:
    return getattr(output, "kvllm_seconds", 0.0)
