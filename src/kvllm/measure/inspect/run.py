"""Build the page from a prompt or a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvllm.errors import UsageError
from kvllm.layers import full_heads
from kvllm.layout import request_geometry
from kvllm.measure.eval.traces import Trace, read_traces
from kvllm.measure.inspect.page import page
from kvllm.measure.inspect.record import record
from kvllm.methods import checked_config


def run(
    folder: Path,
    prompt: str | None,
    traces: Path | None,
    trace_id: str | None,
    max_tokens: int,
    options: Mapping[str, Any],
    block_size: int,
) -> str:
    """The page for one text: the model's greedy answer to `prompt`, or a trace."""
    from transformers import AutoTokenizer

    from kvllm import reference

    config = checked_config(options)
    model, tokenizer = reference.load_model(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    block_size = reference.block_size_of(model, block_size)
    geometry = request_geometry(config, block_size)
    if geometry is None:
        raise UsageError(f"retention_ratio={config.retention_ratio}: nothing is compressed, so nothing could be shown.")
    if reference.Request(model, 1, config, block_size).geometry != geometry or config.budgets:
        raise UsageError(
            f"method={config.method}, retention_ratio={config.retention_ratio}: groups of layers keep different "
            "numbers of tokens, and heads are shown side by side. Use one ratio, and a method without layer budgets."
        )
    if prompt is not None:
        ids = prompt_ids(tokenizer, prompt)
        answer = reference.generate(model, ids, max_tokens, config, block_size).token_ids
    else:
        assert traces is not None
        found = chosen(traces, trace_id)
        ids, answer = found.token_ids[: found.num_prompt_tokens], found.token_ids[found.num_prompt_tokens :]
        answer = answer[:max_tokens]
    text = [*ids, *answer]
    first = geometry.event_at(len(ids), 0)
    if len(text) <= first + 1:
        raise UsageError(
            f"the text has {len(text)} tokens and is compressed from {first + 2} on: nothing could be shown. Use a "
            "longer answer (--max-tokens), or a smaller --window-size or --buffer-size."
        )
    events = record(model, text, len(ids), config, block_size)
    about = {
        "model": folder.name,
        "method": config.method,
        "policy": config.policy,
        "ratio": config.retention_ratio,
        "window": f"{geometry.interval} tokens",
        "buffer": f"{config.buffer_size} tokens",
        "prompt": f"{len(ids)} tokens",
        "answer": f"{len(answer)} tokens",
    }
    num_heads = full_heads(model.config.get_text_config()).num_kv_heads
    return page([tokenizer.decode([token]) for token in text], len(ids), num_heads, events, about)


def prompt_ids(tokenizer: Any, prompt: str) -> Sequence[int]:
    """Tokenise the prompt with the model's chat template, if it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def chosen(path: Path, trace_id: str | None) -> Trace:
    traces = read_traces(path, "--trace")
    if not traces:
        raise UsageError(f"--trace {path}: the file has no traces.")
    if trace_id is None:
        return traces[0]
    for trace in traces:
        if trace.id == trace_id:
            return trace
    raise UsageError(f"--trace-id {trace_id}: {path} has {', '.join(trace.id for trace in traces[:10])}, ...")
