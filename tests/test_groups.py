"""How layers look back, by the config alone, and the KV cache groups that vLLM makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from kvllm.budgets import parse_table
from kvllm.groups import Groups, block_scales, groups_of_model
from kvllm.layers import Cacheless, Heads, LayerKind, Local, Recurrent, full_heads, heads_of, local_layers

WINDOW, CHUNK = Local(128), Local(64, chunked=True)


def config(model_type: str, **options: Any) -> Any:
    return AutoConfig.for_model(model_type, **({"max_position_embeddings": 512, "num_hidden_layers": 4} | options))


@pytest.mark.parametrize(
    "made, expected",
    [
        (config("llama"), [None] * 4),
        (config("mistral", sliding_window=128), [WINDOW] * 4),
        (config("mistral", sliding_window=512), [None] * 4),
        (config("qwen2", use_sliding_window=False, sliding_window=128), [None] * 4),
        (config("gpt_oss", sliding_window=128), [WINDOW, None, WINDOW, None]),
        (config("cohere2", sliding_window=128), [Local(129)] * 3 + [None]),  # 128 before the token itself
        (config("olmo3", sliding_window=None), [None] * 4),
        (config("llama4_text", attention_chunk_size=64), [CHUNK] * 3 + [None]),
        (config("qwen3_next"), [Recurrent()] * 3 + [None]),
        (config("granitemoehybrid", layer_types=["mamba", "attention"] * 2), [Recurrent(), None] * 2),
        (
            config("nemotron_h", layers_block_type=["mamba", "attention", "mlp", "moe"]),
            [Recurrent(), None, Cacheless(), Cacheless()],
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_which_layers_are_local(made: Any, expected: list[LayerKind]) -> None:
    assert local_layers(made, 512) == expected


def test_a_window_longer_than_any_text_is_full_attention() -> None:
    made = config("gpt_oss", sliding_window=128)
    assert local_layers(made, 128) == [None] * 4
    assert local_layers(made, 129) == local_layers(made, None) == [WINDOW, None, WINDOW, None]


def test_the_first_token_that_a_token_sees() -> None:
    positions = np.arange(200)
    seen = [[int(at - first + 1) for at in positions if at >= first] for first in (0,)]
    assert seen[0] == [*range(1, 201)]
    assert (positions - WINDOW.first_seen(positions) + 1).tolist() == [min(n, 128) for n in range(1, 201)]
    assert (positions - CHUNK.first_seen(positions) + 1).tolist() == [n % 64 + 1 for n in range(200)]


@pytest.mark.parametrize(
    "num_full, num_local, expected",
    [
        (12, 12, Groups(12, 1, 1, WINDOW)),  # gpt-oss-20b
        (4, 22, Groups(4, 1, 6, WINDOW)),  # Gemma-3 1B: the last group of 2 is filled up
        (16, 48, Groups(16, 1, 3, WINDOW)),
        (5, 4, Groups(5, 1, 1, WINDOW)),
        (3, 2, Groups(2, 2, 1, WINDOW)),
        (7, 0, Groups(7, 1, 0, None)),
        (0, 7, Groups(7, 0, 1, WINDOW)),
    ],
)
def test_groups_are_of_equal_size(num_full: int, num_local: int, expected: Groups) -> None:
    assert Groups.of([None] * num_full + [WINDOW] * num_local) == expected


def test_blocks_that_are_held_while_a_text_grows() -> None:
    groups = Groups(2, 1, 3, WINDOW)
    counts = np.arange(1, 400)
    held = groups.local_blocks_held(counts, 16)
    assert held[:128].tolist() == [3 * -(-n // 16) for n in range(1, 129)]
    assert set(held[128:].tolist()) <= {3 * 8, 3 * 9}
    assert held.max() <= groups.local_blocks(400, 16, in_flight=1)
    assert groups.local_blocks_held(399, 16) == held[-1]
    chunked = Groups(2, 1, 1, CHUNK).local_blocks_held(counts, 16)
    assert chunked.tolist() == [-(-n // 16) - n // 64 * 4 for n in range(1, 400)]
    assert Groups(2).local_blocks_held(counts, 16).sum() == Groups(2).local_blocks(400, 16, 1) == 0


GEMMA_4: dict[str, Any] = {"sliding_window": 128, "num_hidden_layers": 6, "num_attention_heads": 16}
LARGE = {"num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True}  # of the 31B model


def test_heads_of_layers_that_differ() -> None:
    made = config("gemma4_text", **GEMMA_4, **LARGE)
    assert [heads_of(made, i) for i in (0, 5)] == [Heads(16, 16, 256), Heads(16, 4, 512)]
    assert full_heads(made) == Heads(16, 4, 512)
    assert full_heads(config("llama", num_attention_heads=8, hidden_size=256)) == Heads(8, 8, 32)


@pytest.mark.parametrize(
    "options, num_shards, scales",
    [
        ({"num_key_value_heads": 4}, 1, (1, 2)),
        (LARGE, 1, (2, 1)),
        (LARGE, 4, (2, 1)),
        (LARGE, 8, (1, 1)),  # two heads of 256 with a window, and one of 512
    ],
)
def test_layers_with_less_kv_per_token_get_larger_blocks(
    options: dict[str, Any], num_shards: int, scales: tuple[int, int]
) -> None:
    made = config("gemma4_text", **GEMMA_4, **options)
    groups = groups_of_model(made, 512, (), num_shards)
    assert groups == Groups(1, 1, 5, WINDOW, *scales)
    size = 16 * groups.scale
    assert groups.local_block_size(size) == 16 * groups.local_scale
    plain = Groups(1, 1, 5, WINDOW)
    for count in (1, 130, 400):
        assert groups.local_blocks(count, size, 20) == plain.local_blocks(count, 16 * groups.local_scale, 20)
        assert groups.local_blocks_held(count, size) == plain.local_blocks_held(count, 16 * groups.local_scale)


def test_blocks_that_vllm_would_pad_and_layer_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2: keys have 384 numbers .* 256 .*; use another"):
        block_scales(Heads(8, 2, 384), Heads(8, 2, 256), num_shards=2)
    made = config("gemma4_text", **GEMMA_4 | {"num_hidden_layers": 12}, **LARGE)
    with pytest.raises(ValueError, match=r"layer budgets are not supported in models whose full-attention layers have"):
        groups_of_model(made, 512, parse_table({"5": 0.5, "11": 0.3}))
