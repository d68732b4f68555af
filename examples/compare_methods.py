"""Compare methods on your own texts: `python examples/compare_methods.py MODEL TEXTS.jsonl [METHOD ...]`.

Each line of the file is {"prompt": "...", "answer": "..."}, ideally with an answer that the model generated. Every text
is replayed with the full cache and with compressed ones, and their next-token distributions are compared. Answers
should have at least 500 tokens: nothing is compressed before the first window and the buffer are full.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCK_SIZE = 16


def read_texts(path: Path, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer, and the number of prompt tokens."""
    texts = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(record["prompt"])["input_ids"]
        texts.append((prompt + tokenizer(record["answer"], add_special_tokens=False)["input_ids"], len(prompt)))
    return texts


def compare(model: Any, texts: Sequence[tuple[list[int], int]], methods: Sequence[dict[str, Any]]) -> list[list[float]]:
    """For each configuration: KL divergence from the full cache in nats, and share of equal next tokens.

    Both are means over all tokens from the first compression on."""
    from tqdm import tqdm

    from kvllm.layout import Geometry
    from kvllm.methods import checked_config
    from kvllm.reference import compare, replay

    configs = [checked_config(options) for options in methods]
    sums = [[0.0, 0.0] for _ in configs]
    total = 0
    for token_ids, num_prompt in tqdm(texts, unit=" texts"):
        geometry = Geometry.from_config(configs[0], BLOCK_SIZE)
        first = geometry.event_at(num_prompt, 0) if geometry else len(token_ids)
        if first >= len(token_ids) - 1:
            raise SystemExit(
                f"an answer of {len(token_ids) - num_prompt} tokens is too short to be compressed; after its prompt it "
                f"needs {first - num_prompt + 2}."
            )
        full = replay(model, token_ids, num_prompt, None, BLOCK_SIZE, keep_full=True)
        for own, config in zip(sums, configs, strict=True):
            found = compare(full, replay(model, token_ids, num_prompt, config, BLOCK_SIZE, keep_full=True), first)
            own[0] += found.kl * found.num_tokens
            own[1] += found.top1_agreement * found.num_tokens
        total += found.num_tokens
    return [[value / total for value in own] for own in sums]


def main(arguments: Sequence[str], **options: Any) -> dict[str, list[float]]:
    """options: of KvConfig, the same for all methods"""
    from transformers import AutoTokenizer

    from kvllm.reference import load_model

    folder, file, *names = arguments
    names = names or ["kara", "snapkv", "streaming_llm", "random"]
    texts = read_texts(Path(file), AutoTokenizer.from_pretrained(folder))
    chosen = [{"retention_ratio": 0.3, "method": name, **options} for name in names]
    found = dict(zip(names, compare(load_model(Path(folder)), texts, chosen), strict=True))
    print(f"{'method':20} {'KL, nats':>10} {'same next token':>16}")
    for name, (kl, same) in found.items():
        print(f"{name:20} {kl:10.4f} {same:16.1%}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
