"""What an engine can tell about its blocks, from whatever process it runs in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from vllm import LLM


class EngineStats(TypedDict):
    """Counts since the engine started. Blocks are vLLM's KV blocks of `block_size` tokens, of all KV cache groups.

    What a preempted request repeats counts again.
    """

    block_size: int
    num_kv_blocks: int
    free_kv_blocks: int
    peak_kv_blocks: int
    num_windows_compressed: int
    num_blocks_freed: int
    num_prompts_cut: int  # to their `prompt_budget`
    num_preemptions: int
    num_running: int


def core_stats(engine_core: Any, reset_peak: bool = False) -> EngineStats:
    """`EngineStats` of an engine core; it becomes one of the core's utility methods."""
    return engine_core.scheduler.engine_stats(reset_peak)


def engine_stats(llm: LLM, reset_peak: bool = False) -> EngineStats:
    """`EngineStats` of an `LLM` with KvLLM configured, in process or not.

    reset_peak: start a new `peak_kv_blocks` after this reading.
    """
    client = llm.llm_engine.engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility("kvllm_stats", reset_peak)
    return core_stats(client.engine_core, reset_peak)  # type: ignore[attr-defined]
