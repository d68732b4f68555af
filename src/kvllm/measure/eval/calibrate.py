"""The query statistics that the method `triattention` needs, from texts that the model wrote.

python -m kvllm.measure.eval.calibrate --traces traces.jsonl --model DIR --out statistics.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvllm.errors import UsageError
from kvllm.measure.eval.report import Progress
from kvllm.measure.eval.traces import HALVES, Trace, half_of, read_traces
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
    places = torch.arange(0, request.num_computed_tokens, stride, device=queries.device)
    rope = Rope(frequencies.to(queries.device))
    return rope.turn(-places, queries.shape[-1]).apply(queries.float()).cpu()


def rope_frequencies(model: PreTrainedModel) -> Tensor:
    """[head_dim / 2] in float64; UsageError where the model's RoPE is more than a rotation of every pair of halves."""
    name, rope = type(model).__name__, rope_of(model)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope is None or rope.interleaved or rope.frequencies.shape != (head_dim // 2,):
        raise UsageError(f"{name}: not the same RoPE of all dimensions, by halves, in every layer; not done.")
    scaling = getattr(model.get_decoder().rotary_emb, "attention_scaling", 1.0)
    if scaling != 1.0:
        raise UsageError(f"{name}: its RoPE scales attention by {scaling}; not done.")
    return rope.frequencies.cpu()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvllm eval calibrate", description="Take the query statistics for --method triattention from traces."
    )
    parser.add_argument("--traces", type=Path, required=True, help="JSONL that `kvllm eval traces` wrote")
    parser.add_argument("--model", required=True, help="folder of the model that wrote them")
    parser.add_argument("--out", type=Path, required=True, help="file to write; method_options' `statistics`")
    parser.add_argument("--half", choices=HALVES, help="only every other trace, so that the rest can be reported on")
    parser.add_argument("--limit", type=int, default=32, help="most traces to take")
    parser.add_argument("--stride", type=int, default=4, help="take every n-th query")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ...; auto: float32 on the CPU, else bfloat16"
    )
    options = parser.parse_args(arguments)

    traces = half_of(read_traces(options.traces), options.half)[: options.limit]
    dtype = options.dtype if options.dtype != "auto" else ("float32" if options.device == "cpu" else "bfloat16")
    model = load_model(options.model, getattr(torch, dtype), options.device)
    frequencies, progress = rope_frequencies(model), Progress("traces")
    samples = []
    for done, trace in enumerate(traces, start=1):
        samples.append(queries_before_rope(model, trace, frequencies, options.stride))
        progress(done, len(traces))
    queries = torch.cat(samples, dim=2)
    save_statistics(str(options.out), queries, frequencies)
    print(f"{options.out}: {queries.shape[2]} queries of each of {queries.shape[0]} x {queries.shape[1]} heads")


if __name__ == "__main__":
    main()
