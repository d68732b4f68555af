"""An fp8 KV cache under FlashAttention: what the kernels leave in it is what the method itself leaves. Needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from kvllm.compression.compressor import Compressor
from kvllm.compression.paged_store import PagedCandidates
from kvllm.engine.stats import engine_stats
from kvllm.kernels.windows import gather_window_ref
from kvllm.layout import Shape
from tests.gpu.test_engine_gpu import greedy, model_dir, prompt, start  # noqa: F401

pytestmark = pytest.mark.engine

NUM_TOKENS = 300


def test_events_in_an_fp8_cache(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    options: dict[str, Any] = {
        "dtype": "bfloat16", "attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8", "num_gpu_blocks_override": 150,
    }  # fmt: skip
    llm = start(model_dir, **options)
    errors: list[Tensor] = []
    compress_batch = Compressor.compress_batch

    def both(compressor: Compressor, batch: Any, shape: Shape, candidates: PagedCandidates) -> None:
        """By the kernels, then from the same cache by the method itself; the kernels' result stays."""
        cache = compressor.store.cache  # type: ignore[attr-defined]
        layers = [t.view(torch.uint8) for t in (*cache.keys, *cache.values)]

        def survivors() -> tuple[Tensor, ...]:
            return tuple(t[:, : shape.num_kept] for t in gather_window_ref(candidates.blocks, cache, torch.float32))

        before = [t.clone() for t in layers]
        assert compressor.fused is not None
        compress_batch(compressor, batch, shape, candidates)
        after, actual = [t.clone() for t in layers], survivors()
        for t, old in zip(layers, before, strict=True):
            t.copy_(old)
        fused, compressor.fused = compressor.fused, None
        compress_batch(compressor, batch, shape, candidates)
        compressor.fused = fused
        for a, e in zip(actual, survivors(), strict=True):
            errors.append((a - e).norm(dim=(1, 3)) / e.norm(dim=(1, 3)))  # of each layer and head
        for t, new in zip(layers, after, strict=True):
            t.copy_(new)

    monkeypatch.setattr(Compressor, "compress_batch", both)
    prompts = [prompt(n, n) for n in (5, 70)]
    outputs = greedy(llm, prompts, NUM_TOKENS)
    monkeypatch.undo()
    stats, error = engine_stats(llm), torch.cat([e.flatten() for e in errors])
    print("windows:", stats["num_windows_compressed"], "errors:", error.quantile(torch.tensor([0.5, 0.9, 1.0]).cuda()))
    assert [len(o) for o in outputs] == [NUM_TOKENS] * 2
    assert stats["num_windows_compressed"] >= 6 and stats["free_kv_blocks"] == stats["num_kv_blocks"]
    # Three bits of mantissa, and now and then another of two tokens that score alike.
    assert error.median() < 0.05 and (error < 0.3).float().mean() > 0.9

    # Before the first event nothing is different from an engine that compresses nothing.
    whole = greedy(llm, prompts, NUM_TOKENS, ratio=1.0)
    for p, compressed, full in zip(prompts, outputs, whole, strict=True):
        first_event = -(-len(p) // 16) * 16 + 64 + 32 - len(p)
        assert compressed[:first_event] == full[:first_event]
    llm.llm_engine.engine_core.shutdown()
