"""Compute the query statistics that `triattention` needs from texts that the model generated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvllm.errors import UsageError
from kvllm.measure.eval.problems import half_of
from kvllm.measure.eval.report import Progress
from kvllm.measure.eval.traces import Trace, read_traces
from kvllm.methods.rope import Rope
from kvllm.methods.triattention import save_statistics
from kvllm.reference import Request, feed, load_model
from kvllm.reference.rope import rope_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def queries_before_rope(model: PreTrainedModel, trace: Trace, frequencies: Tensor, stride: int) -> Tensor:
    """[num_layers, num_heads, num_samples, head_dim] on the CPU: every `stride`-th query of the text, RoPE undone."""
    request = Request(model, trace.num_prompt_tokens, max_queries=len(trace.token_ids))
    feed(request, trace.token_ids)
    queries = torch.stack([layer.queries[::stride] for layer in request.layers]).transpose(1, 2)
    positions = torch.arange(0, request.num_computed_tokens, stride, device=queries.device)
    return Rope(frequencies.to(queries.device)).undo(queries, positions).cpu()


def rope_frequencies(model: PreTrainedModel) -> Tensor:
    """[head_dim / 2] in float64. Raises UsageError unless RoPE only rotates all pairs (i, i + head_dim / 2)."""
    name, rope = type(model).__name__, rope_of(model)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope is None or rope.interleaved or rope.frequencies.shape != (head_dim // 2,):
        raise UsageError(
            f"{name}: not supported: RoPE must be the same in every layer and rotate all pairs (i, i + head_dim / 2)."
        )
    scaling = getattr(model.get_decoder().rotary_emb, "attention_scaling", 1.0)
    if scaling != 1.0:
        raise UsageError(f"{name}: not supported: its RoPE scales attention by {scaling}.")
    return rope.frequencies.cpu()


def run(
    traces_path: Path, folder: str, out: Path, half: str | None, limit: int, stride: int, device: str, dtype: str
) -> None:
    """Write the statistics of every `stride`-th query of the traces to `out`; folder: of the traced model."""
    traces = half_of(read_traces(traces_path), half)[:limit]
    model = load_model(folder, getattr(torch, dtype), device)
    frequencies, progress = rope_frequencies(model), Progress("traces")
    samples = []
    progress(0, len(traces))
    for done, trace in enumerate(traces, start=1):
        samples.append(queries_before_rope(model, trace, frequencies, stride))
        progress(done, len(traces))
    queries = torch.cat(samples, dim=2)
    save_statistics(str(out), queries, frequencies)
    print(f"{out}: {queries.shape[2]} queries of each of {queries.shape[0]} x {queries.shape[1]} heads")
