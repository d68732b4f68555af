"""The arithmetic of `kvllm plan` against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen3Config,
)

from kvllm.cli.plan import local_blocks, parse_bytes, parse_lengths, plan, pool_bytes
from kvllm.compression.footprint import Footprint, default_max_num_seqs, fitting_max_num_seqs, footprint
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.groups import Groups
from kvllm.layers import Local
from kvllm.layout import Geometry, request_geometry
from kvllm.support import packed_problem

SHAPE: dict[str, Any] = dict(
    vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, dtype="bfloat16",
)  # fmt: skip
# Embedding 1000 * 64; a layer: q and o 64 * 64, k and v 64 * 32, three matrices of 64 * 160, two norms; a last norm.
LAYER_MATRICES = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
PARAMETERS = 1000 * 64 + 3 * (LAYER_MATRICES + 2 * 64) + 64


def test_footprint_of_a_llama() -> None:
    # A token's KV: keys and values of 3 layers, 2 heads of 16 numbers, 2 bytes each.
    # 16 requests have 96 queries of 3 layers and 4 heads, each 16 numbers of half a byte and a scale of two.
    bank = 16 * 96 * 3 * 4 * (8 + 2)
    expected = Footprint(2 * PARAMETERS, kv_per_token=2 * 3 * 2 * 16 * 2, query_bank=bank, groups=Groups(3))
    assert footprint(LlamaConfig(**SHAPE, tie_word_embeddings=True), KvConfig(), max_num_seqs=16) == expected


def test_the_query_bank_follows_window_buffer_stride_and_dtype() -> None:
    config = LlamaConfig(**SHAPE | {"dtype": "float32"})
    thin = KvConfig(window_size=128, buffer_size=32, query_stride=8)
    assert footprint(config, thin, 5).query_bank == 5 * 20 * 3 * 4 * (16 * 4 + 2)


def test_max_num_seqs_as_vllm_chooses_it() -> None:
    small = Footprint(weights=0, kv_per_token=1, query_bank=1)
    sizes = [default_max_num_seqs(parse_bytes(size), 0.9, small) for size in ("24GiB", "69GiB", "80GB")]
    assert sizes == [256, 256, 1024]


def test_the_query_bank_takes_at_most_a_twentieth_of_the_memory() -> None:
    one = Footprint(weights=400_000, kv_per_token=1, query_bank=100)
    assert fitting_max_num_seqs(1_000_000, 0.9, one) == 248  # 250 in 25,000 of the 500,000 that are left
    assert fitting_max_num_seqs(1_000_000, 0.9, one, num_shards=2) == 696  # half the weights, half of each bank
    assert fitting_max_num_seqs(450_000, 0.9, one) == 8
    assert default_max_num_seqs(1_000_000, 0.9, one) == 248


def test_an_untied_output_matrix_counts() -> None:
    assert footprint(LlamaConfig(**SHAPE, tie_word_embeddings=False), KvConfig(), 1).weights == 2 * (
        PARAMETERS + 1000 * 64
    )


def test_head_dim_of_its_own_and_an_fp8_cache() -> None:
    config = Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=True)
    assert footprint(config, KvConfig(), 1).kv_per_token == 2 * 3 * 2 * 128 * 2
    assert footprint(config, KvConfig(), 1, "fp8").kv_per_token == 2 * 3 * 2 * 128


def test_quantized_linear_weights_shrink_and_the_rest_does_not() -> None:
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True)
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    assert footprint(config, KvConfig(), 1).weights == 2 * PARAMETERS - 3 * LAYER_MATRICES * 2 + 3 * LAYER_MATRICES // 2


def test_an_unknown_quantization_asks_for_the_size() -> None:
    config = LlamaConfig(**SHAPE)
    config.quantization_config = {"quant_method": "vector"}
    with pytest.raises(ValueError, match="--weights"):
        footprint(config, KvConfig(), 1)
    assert footprint(config, KvConfig(), 1, weights=123).weights == 123


def test_a_model_that_is_refused_has_no_plan() -> None:
    config = MistralConfig(**SHAPE, sliding_window=128)
    with pytest.raises(ValueError, match="sliding_window=128: no layer has full attention"):
        footprint(config, KvConfig(), 1)


def test_layers_with_a_window_have_groups_of_their_own_and_no_bank() -> None:
    # Three groups of two layers: one of full attention, two with a window.
    shape = SHAPE | {"num_hidden_layers": 6, "head_dim": 16}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    found = footprint(Gemma3TextConfig(**shape, sliding_window=128, layer_types=kinds), KvConfig(), 1)
    assert found.groups == Groups(2, 1, 2, Local(128))
    assert found.kv_per_token == 2 * 2 * 2 * 16 * 2
    assert found.query_bank == 96 * 2 * 4 * (8 + 2)
    assert local_blocks(found.groups, 16, 1, 100) == 2 * 7
    assert local_blocks(found.groups, 16, 1, 5000) == 2 * 10  # 127 tokens and two in flight, anywhere in their blocks
    assert local_blocks(found.groups, 16, 1000, 5000) == 2 * 63  # the prompt, computed in one step


def test_layers_with_other_heads_have_blocks_of_another_size() -> None:
    """As in Gemma 4: a token has 2 heads of 16 in a layer with a window, and one of 16 in one of full attention."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma4TextConfig(
        **SHAPE | {"num_hidden_layers": 6, "head_dim": 16}, global_head_dim=16, num_global_key_value_heads=1,
        attention_k_eq_v=True, sliding_window=128, layer_types=kinds,
    )  # fmt: skip
    found = footprint(config, KvConfig(), 1, weights=0, max_model_len=5000)
    assert found.groups == Groups(2, 1, 2, Local(128), scale=2)
    assert found.kv_per_token == 2 * 2 * 1 * 16 * 2
    assert found.query_bank == 96 * 2 * 4 * (8 + 2)
    geometry = Geometry.from_config(KvConfig(window_size=256, buffer_size=56, retention_ratio=0.25), 32)
    (row,) = plan(found, 1000 * found.kv_per_token * 32, geometry, 32, 256, [1600]).rows
    local = 2 * 16  # of 16 tokens each, while the prompt is computed
    # Of 32 tokens: at most the prompt, four windows' two blocks each, one window and 56 tokens.
    assert (row.stock_blocks, row.kvllm_blocks) == (50 + local, 8 + 8 + 8 + 2 + local)


def test_plans_count_all_groups() -> None:
    geometry = Geometry.from_config(KvConfig(window_size=256, buffer_size=56, retention_ratio=0.3), 16)
    made = Footprint(0, 100, 0, Groups(4, 1, 3, Local(128)))
    (row,) = plan(made, 100 * 16 * 1000, geometry, 16, 256, [1408]).rows
    local = 3 * 16  # while the prompt is computed; later 3 * 10
    assert (row.stock_blocks, row.kvllm_blocks) == (88 + local, 50 + local)
    assert (row.stock_requests, row.kvllm_requests) == (999 // 136, 999 // 98)


def test_a_plan_with_layer_budgets_saves_the_bytes_of_their_mean() -> None:
    """Blocks hold one group of layers each: half as many bytes, twice as many blocks for stock as well."""
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 4})
    options = KvConfig(retention_ratio={"0,1": 0.5, "2,3": 0.25})
    table, plain = footprint(config, options, 0, weights=0), footprint(config, KvConfig(), 0, weights=0)
    assert table.groups == Groups(2, 2) and 2 * table.kv_per_token == plain.kv_per_token
    length = 256 + 128 + 8 * 256 + 1  # eight windows
    (row,) = plan(table, 2**30, request_geometry(options, 16), 16, 256, [length]).rows
    (uniform,) = plan(plain, 2**30, request_geometry(KvConfig(retention_ratio=0.375), 16), 16, 256, [length]).rows
    assert row.stock_blocks == 2 * uniform.stock_blocks and row.kvllm_blocks == 2 * uniform.kvllm_blocks
    assert row.kvllm_requests == uniform.kvllm_requests
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    shape = SHAPE | {"num_hidden_layers": 6, "head_dim": 16}
    mixed = Gemma3TextConfig(**shape, sliding_window=128, layer_types=kinds)
    beside = footprint(mixed, KvConfig(retention_ratio={"2": 0.5, "5": 0.25}), 0, weights=0)
    assert beside.groups == Groups(1, 2, 4, Local(128))


def test_pool_is_the_share_less_weights_query_bank_and_reserve() -> None:
    footprint = Footprint(weights=300, kv_per_token=1, query_bank=50)
    assert pool_bytes(1000, 0.9, 100, footprint) == 450
    with pytest.raises(ValueError, match="--max-num-seqs"):
        pool_bytes(500, 0.9, 100, footprint)


def test_requests_that_fit() -> None:
    # 16 blocks of 16 tokens protect the prompt, and of three windows of 16 blocks round(3 * 0.3 * 16) = 14 are kept.
    # The fourth window closes at 256 + 4 * 256 + 56 = 1336 tokens, when the request holds three compressed windows and
    # a raw one: 16 + 14 + 16 + 3.5 blocks, so 50, more than the 16 + 19 + 8 = 43 that 1408 tokens take afterwards.
    geometry = Geometry.from_config(KvConfig(window_size=256, buffer_size=56, retention_ratio=0.3), 16)
    # The query bank takes the room of 100 blocks.
    footprint = Footprint(weights=0, kv_per_token=100, query_bank=100 * 16 * 100)
    made = plan(footprint, 100 * 16 * 265, geometry, 16, 256, [320, 1408])
    assert (made.num_blocks, made.stock_num_blocks) == (265, 365)
    short, long = made.rows
    assert (short.stock_blocks, short.kvllm_blocks) == (20, 20)  # before the first window closes
    assert (long.stock_blocks, long.kvllm_blocks) == (88, 50)
    assert (long.stock_requests, long.kvllm_requests) == (4, 5)  # of 364 and 264 blocks: vLLM keeps one


def test_at_ratio_one_both_are_the_same() -> None:
    off = Geometry.from_config(KvConfig(retention_ratio=1.0), 16)
    (row,) = plan(Footprint(0, 1, 0), 16 * 1000, off, 16, 10, [999]).rows
    assert (row.stock_blocks, row.stock_requests) == (row.kvllm_blocks, row.kvllm_requests) == (63, 15)


@pytest.mark.parametrize(
    "text, expected",
    [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("24g", 24 * 10**9), ("1.5 MiB", 3 * 2**19), ("4096", 4096)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3G", "80GX", "-1G", ".", "24,5G", "80 GiB each", "80.", "80G-1"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="80GiB"):
        parse_bytes(text)


def test_lengths() -> None:
    assert parse_lengths("2048, 8192") == [2048, 8192]


def test_a_vision_language_model_is_counted_by_its_language_model() -> None:
    config = Qwen2_5_VLConfig(text_config={**SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    found = footprint(config, KvConfig(), 1, weights=1)
    assert found.kv_per_token == footprint(LlamaConfig(**SHAPE), KvConfig(), 1, weights=1).kv_per_token


@pytest.mark.parametrize(
    "bits, dtype, problem",
    [
        (16, "float32", None),
        (4, "bfloat16", None),
        (8, "bfloat16", "survivor_bits=8: not supported on GPUs"),
        (4, "float32", "dtype=float32"),
    ],
)
def test_a_plan_packs_what_a_gpu_packs(bits: int, dtype: str, problem: str | None) -> None:
    found = packed_problem(bits, dtype)
    assert found is None if problem is None else found is not None and problem in found


def test_a_size_without_its_unit_is_refused() -> None:
    with pytest.raises(UsageError, match="--memory 80: without a unit .*; did you mean 80GiB?"):
        parse_bytes("80")
    assert parse_bytes("80000000000") == 80 * 10**9 and parse_bytes("0") == 0
