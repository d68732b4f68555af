"""Warming up compiles all that serving needs: a kernel compiled while it serves holds up every request for seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from kvllm.checks import allowed_geometries
from kvllm.compression.rows import Due
from kvllm.config import KvConfig
from kvllm.kernels.paged import INTERPRETED
from tests.kernels.paged_caches import random_cache
from tests.kernels.test_worker import BLOCK_SIZE, HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, SIZES, worker_state

Variant = tuple[Any, ...]


def variant(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    """What Triton compiles a kernel anew for: dtypes, aligned addresses, integers that are 1 or a multiple of 16."""
    given = kernel.kwargs.get("do_not_specialize") or []
    unaligned = kernel.kwargs.get("do_not_specialize_on_alignment") or []

    def own(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), name in unaligned or value.data_ptr() % 16 == 0
        if type(value) is int and name in kernel.arg_names:
            return "int" if name in given else (value == 1, value % 16 == 0)
        return "float" if isinstance(value, float) and name in kernel.arg_names[: len(args)] else value

    named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    return kernel.fn.__name__, *sorted((name, repr(own(name, value))) for name, value in named.items())


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows the arguments of every launch")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="refit"),
        pytest.param({"method_options": {"key_ridge": 0.0, "value_ridge": 0.0}}, id="compact"),
        pytest.param({"window_size": 24, "buffer_size": 24}, id="an odd number of blocks"),
        # Prompts are cut in parts of as many layers as their lengths allow.
        pytest.param({"method": "snapkv", "prompt_budget": 16}, id="prompts"),
    ],
)
def test_no_number_of_due_requests_needs_another_variant(options, monkeypatch):
    config = KvConfig(**{"method": "kara", **SIZES, **options})
    cache = random_cache(
        num_layers=NUM_LAYERS, num_blocks=64, block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    state = worker_state(config, cache, "cpu")
    launched: set[Variant] = set()

    def recorded(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.add(variant(kernel, args, kwargs))

    monkeypatch.setattr(InterpretedFunction, "run", recorded)  # nothing runs: the results do not matter
    geometries = allowed_geometries(config, BLOCK_SIZE)
    state.warm_up(geometries)
    compiled = set(launched)
    assert compiled or config.method != "kara"
    table = torch.arange(1, 49, dtype=torch.int32).view(3, 16)
    for num_due in range(1, 8):
        prompt = 24 + 8 * num_due if config.prompt_budget else 5
        due = [Due(i % 3, i % 3, geometries[0], prompt, 0) for i in range(num_due)]
        assert state.store is not None
        state.store.begin_step(table)
        state.compressors[config.method].compress(due)
    assert launched == compiled
