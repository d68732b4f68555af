"""Find settings for a file of texts."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvllm.errors import UsageError
from kvllm.measure.environment import environment
from kvllm.measure.eval.report import Progress, interval, markdown
from kvllm.measure.eval.traces import write_traces
from kvllm.measure.tune.choose import answer_len, candidates, choose, measure, pareto, serve_flags, split
from kvllm.measure.tune.texts import read_texts
from kvllm.methods import resolved
from kvllm.reference import block_size_of, load_model


def run(
    path: Path,
    folder: str,
    saving: float | None,
    max_kl: float | None,
    max_tokens: int,
    temperature: float,
    limit: int | None,
    block_size: int,
    device: str,
    dtype: str,
    save_traces: Path | None,
) -> tuple[str, dict[str, Any]]:
    """Returns the text to print and the report for JSON.

    saving, max_kl: exactly one of them; see `choose`
    """
    import torch
    from transformers import AutoTokenizer

    if (saving is None) == (max_kl is None):
        raise UsageError("give either --saving or --max-kl: the saving that you want, or the loss that you accept.")
    model = load_model(folder, getattr(torch, dtype), device)
    block_size = block_size_of(model, block_size)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    start = time.perf_counter()
    texts = read_texts(path, model, tokenizer, max_tokens, temperature, limit)
    if save_traces:
        write_traces(save_traces, texts)
    found = candidates(model.config, texts, block_size)
    if not any(each.saving > 1 for each in found):
        longest = max(answer_len(text) for text in texts)
        raise UsageError(
            f"{path}: the longest answer has {longest} tokens, and nothing is compressed before there are 256 "
            "generated ones; use longer answers (--max-tokens where the model writes them)."
        )
    measure(model, texts, found, block_size, Progress("texts"))
    seen, unseen = split(texts)
    chosen = choose(found, seen, saving, max_kl)
    flags, kl = serve_flags(chosen.config), chosen.kl(unseen)
    command = shlex.join(["kvllm", "serve", folder, *flags])
    rows = [
        [" ".join(serve_flags(each.config)) or "(the defaults)", f"{each.saving:.2f}", interval(each.kl(seen), 4)]
        for each in pareto(found, seen)
    ]
    table = markdown(["settings", "saving", "KL"], rows)
    judged = (
        f"the {len(unseen)} texts that the choice did not see" if seen != unseen else "the same texts: there are few"
    )
    answers = sum(map(answer_len, texts)) / len(texts)
    lines = [
        table,
        "",
        f"{command}",
        "",
        f"KL {interval(kl, 4)} nats a token, on {judged}; {chosen.saving:.2f} times less KV cache over the life of",
        f"these {len(texts)} texts, whose answers have {answers:.0f} tokens on average. Longer answers save more.",
    ]
    report = {
        "task": "tune",
        **environment(),
        "model": Path(folder).name,
        "texts": path.name,
        "num_texts": len(texts),
        "dtype": dtype,
        "block_size": block_size,
        "wanted": {"saving": saving, "max_kl": max_kl},
        "flags": flags,
        "config": resolved(chosen.config),
        "saving": chosen.saving,
        "kl": asdict(kl),
        "kl_of_texts": unseen,
        "seconds": time.perf_counter() - start,
        "results": [
            {
                "flags": serve_flags(each.config),
                "saving": each.saving,
                "kl": asdict(each.kl(seen)),
                "kl_unseen": asdict(each.kl(unseen)),
            }
            for each in found
        ],
    }
    return "\n".join(lines), report
