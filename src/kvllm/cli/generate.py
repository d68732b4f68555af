"""`kvllm generate`: answer one prompt with vLLM in this process and measure the KV cache that compression saved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvllm.cli.offline import start_llm
from kvllm.errors import UsageError
from kvllm.layout import ceil_div

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of `kvllm generate`, with vLLM's names."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None
    ignore_eos: bool


@dataclass(frozen=True)
class Generation:
    """The answer to a prompt, and the KV cache it used."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    num_windows_compressed: int
    peak_kv_blocks: int  # as counted in the scheduler's block pool
    stock_kv_blocks: int  # blocks of the same tokens uncompressed
    block_size: int
    seconds: float
    tokens_per_second: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> Table:
        saved = 1 - self.peak_kv_blocks / self.stock_kv_blocks
        table = Table("", "", show_header=False)
        table.add_row("tokens generated", f"{len(self.token_ids)} in {self.seconds:.1f} s")
        table.add_row("tokens per second", f"{self.tokens_per_second:.1f}")
        table.add_row(f"KV blocks at the peak ({self.block_size} tokens each)", f"{self.peak_kv_blocks}")
        table.add_row("KV blocks of the same text uncompressed", f"{self.stock_kv_blocks}: {saved:.0%} saved")
        table.add_row("windows compressed", f"{self.num_windows_compressed}")
        return table


def generate(
    arguments: Sequence[str],
    options: Mapping[str, Any] | None,
    prompt: str,
    sampling: Sampling,
    chat: bool | None,
    console: Console,
) -> Generation:
    """Start an engine and answer one prompt.

    arguments: MODEL and any of vLLM's engine flags
    options:   fields of KvConfig; None: stock vLLM
    chat:      wrap the prompt in the model's chat template; None: if it has one
    """
    llm = start_llm(arguments, options, console)  # in this process: the scheduler's block pool is read after the run
    from vllm import SamplingParams

    stats = _stock_stats(llm) if options is None else _engine_stats(llm)
    prompt_ids = encode(llm.get_tokenizer(), prompt, chat)
    engine = llm.llm_engine
    start = time.perf_counter()
    engine.add_request("0", {"prompt_token_ids": prompt_ids}, SamplingParams(**asdict(sampling)))
    with _progress(console) as progress:
        task = progress.add_task("generating", total=sampling.max_tokens, speed=0.0)
        while engine.has_unfinished_requests():
            for output in engine.step():
                done = len(output.outputs[0].token_ids)
                progress.update(task, completed=done, speed=done / (time.perf_counter() - start))
    seconds = time.perf_counter() - start
    token_ids = list(output.outputs[0].token_ids)
    peak, windows, block_size = stats()
    return Generation(
        prompt_token_ids=prompt_ids,
        token_ids=token_ids,
        text=output.outputs[0].text,
        num_windows_compressed=windows,
        peak_kv_blocks=peak,
        stock_kv_blocks=_stock_blocks(llm, len(prompt_ids), len(prompt_ids) + len(token_ids), block_size),
        block_size=block_size,
        seconds=seconds,
        tokens_per_second=len(token_ids) / seconds,
    )


def _stock_blocks(llm: LLM, num_prompt_tokens: int, num_tokens: int, block_size: int) -> int:
    """Peak number of blocks that stock vLLM holds for a text; for sliding-window layers, as counted at admission.

    In units of the engine's blocks; with layer budgets each block belongs to one group of layers.
    """
    from kvllm.engine.settings import groups_of_engine

    config = llm.llm_engine.vllm_config
    groups = groups_of_engine(config)
    in_prefill = min(num_prompt_tokens, config.scheduler_config.max_num_batched_tokens)
    local = groups.peak_local_blocks(num_prompt_tokens, num_tokens, block_size, in_prefill, decode_in_flight=1)
    return local + groups.num_full * ceil_div(num_tokens, block_size)


# Returns (peak KV blocks in use, windows compressed, block size).
Stats = Callable[[], tuple[int, int, int]]


def _engine_stats(llm: Any) -> Stats:
    from kvllm.engine.stats import engine_stats

    def read() -> tuple[int, int, int]:
        stats = engine_stats(llm)
        return stats["peak_kv_blocks"], stats["num_windows_compressed"], stats["block_size"]

    return read


def _stock_stats(llm: Any) -> Stats:
    """The same figures for an engine without KvLLM, read from its block pool after every scheduling step."""
    from kvllm.engine.settings import groups_of_engine

    config = llm.llm_engine.vllm_config
    block_size = config.cache_config.block_size * groups_of_engine(config).scale
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool, schedule = scheduler.kv_cache_manager.block_pool, scheduler.schedule
    peak = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal peak
        output = schedule(*args, **kwargs)
        peak = max(peak, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())  # - 1: the null block
        return output

    scheduler.schedule = counting
    return lambda: (peak, 0, block_size)


def encode(tokenizer: Any, prompt: str, chat: bool | None) -> list[int]:
    """Token ids of the prompt. Raises UsageError if `chat` is True but the model has no chat template."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise UsageError("--chat: this model's tokenizer has no chat template; use --no-chat.")
    if chat is False or not has_template:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.1f} tokens/s"),
        TimeElapsedColumn(),
        console=console,
    )
