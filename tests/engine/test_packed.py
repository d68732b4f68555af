"""Which attention reads what, step by step: our kernel alone, or the backend merged with it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvllm.compression.rounding import Rounding, packed_block_tokens
from kvllm.compression.worker import PLAN_ROWS
from kvllm.engine import packed as engine_packed
from kvllm.engine.log_sum_exp import LOG_SUM_EXP
from kvllm.engine.packed import PackedSurvivors
from kvllm.kernels.packed.attend import attend_plain_ref
from tests.kernels.packed.test_attend import Case

BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 64


class Impl:
    """FlashAttention's part: attention over the table that it gets, and its log-sum-exp."""

    logits_soft_cap, vllm_flash_attn_version, supports_quant_query_input = 0, 3, True

    def __init__(self, case, sinks):
        self.case, self.sinks, self.scale, self.calls = case, sinks, case.scale, 0

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        assert LOG_SUM_EXP.wanted
        self.calls += 1
        found, LOG_SUM_EXP.value = backend(self.case, query, self.sinks)
        output.copy_(found)
        return output


def backend(case, query, sinks):
    """Attention of each token over all plain tokens of its request (a real backend would mask a chunk's later ones)."""
    counts = case.batch.query_start_loc.diff().long()
    plain = case.plain._replace(
        block_table=case.plain.block_table.repeat_interleave(counts, 0),
        seq_lens=case.plain.seq_lens.repeat_interleave(counts, 0),
    )
    output, lse = attend_plain_ref(query, case.cache.keys[0], case.cache.values[0], plain, case.scale, 0.0, sinks)
    return output.to(query.dtype), lse.float()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("counts, captured, calls", [([1, 1, 1], 1, 0), ([1, 1, 1], 3, 1), ([1, 3, 1], 3, 1)])
def test_the_backend_attends_only_in_prefill(counts, captured, calls, with_sinks, monkeypatch):
    """Or where a step runs in a graph that was captured for prefill as well (`cudagraph_mode=FULL`)."""
    check(counts, captured, calls, with_sinks, monkeypatch)


def test_the_backend_attends_in_an_fp8_cache(monkeypatch):
    monkeypatch.setattr(PackedSurvivors, "_plain_too", False)
    check([1, 1, 1], 1, 1, False, monkeypatch)


def check(counts, captured, calls, with_sinks, monkeypatch):
    """captured: the most tokens of a request for which the step's graph was captured"""
    monkeypatch.setattr(engine_packed, "PATCH", SimpleNamespace(apply=lambda: None))
    packed, lengths = [2, 1, 0], [20, 33, 7]
    case = Case(BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM, torch.float32, False, 0.0, counts, packed, lengths, "cpu", 1)
    sinks = torch.linspace(-1, 2, HEADS) if with_sinks else None
    impl = Impl(case, sinks)
    layer = SimpleNamespace(
        impl=impl, attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"), num_heads=HEADS, num_kv_heads=KV_HEADS,
        head_size=HEAD_DIM, kv_cache_dtype="auto",
    )  # fmt: skip
    rounding = Rounding(4, packed_block_tokens(BLOCK_SIZE, HEAD_DIM, 4, "auto"))
    survivors = PackedSurvivors([layer], rounding, torch.float32)
    survivors.start_first()
    most = len(case.batch.survivor_blocks)
    rows = PLAN_ROWS + survivors.plan_rows(most, KV_HEADS)
    plan = torch.zeros(rows, most, dtype=torch.int32)
    survivors.attach(case.cache, case.batch.survivor_blocks, plan)
    host = np.zeros((rows, most), np.int32)
    host[:PLAN_ROWS, : len(counts)] = case.batch.plan[:PLAN_ROWS, : len(counts)].numpy()
    survivors.write_plan(host, np.array(counts), np.array(lengths))
    plan.copy_(torch.from_numpy(host))

    output = torch.full_like(case.query, torch.nan)
    metadata = SimpleNamespace(
        num_actual_tokens=sum(counts), query_start_loc=case.batch.query_start_loc, max_query_len=captured,
        block_table=case.plain.block_table, seq_lens=case.plain.seq_lens,
    )  # fmt: skip
    assert impl.forward(layer, case.query, None, None, None, metadata, output) is output
    assert impl.calls == calls and not LOG_SUM_EXP.wanted
    expected, lse = backend(case, case.query, sinks)
    case.assert_close(output, case.merged(expected, lse, case.cache.keys[0], case.cache.values[0]))
