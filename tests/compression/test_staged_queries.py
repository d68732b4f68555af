"""Queries stored many steps at once against the same queries stored step by step."""

import numpy as np
import pytest
import torch

from kvllm.compression.query_bank import QueryBank
from kvllm.compression.staged_queries import StagedQueries

NUM_LAYERS, HEAD_DIM = 2, 8


def bank_of(stride: int, group_size: int = 3, num_queries: int = 6) -> QueryBank:
    return QueryBank.allocate(NUM_LAYERS, 3, num_queries, 2 * group_size, 2, HEAD_DIM, stride, torch.bfloat16)


def run(staged: StagedQueries, direct: QueryBank, codes: list[list[int]], padding: int = 0) -> None:
    """Offer the queries of these steps to both; a dummy run, with queries of its own, after every step."""
    generator = torch.Generator().manual_seed(len(codes))
    for own in codes:
        step_codes = np.array(own)
        query = torch.randn(NUM_LAYERS, len(own) + padding, direct.num_heads, HEAD_DIM, generator=generator).bfloat16()
        staged.begin_step(staged.steps(step_codes[None])[0])
        for layer in range(NUM_LAYERS):
            staged.capture(layer, query[layer])
            direct.store(layer, query[layer, : len(own)], torch.from_numpy(step_codes))
        staged.skip_step()
        for layer in range(NUM_LAYERS):
            staged.capture(layer, torch.full_like(query[layer], torch.nan))


def equal(bank: QueryBank, other: QueryBank) -> bool:
    return torch.equal(bank.queries, other.queries) and torch.equal(bank.scales, other.scales)


@pytest.mark.parametrize("stride, group_size", [(1, 1), (4, 3), (4, 4), (8, 1), (2, 8)])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_bank_gets_what_it_would_step_by_step(stride, group_size, padding):
    """Two rows that decode, one of them from before its ring starts; far more tokens than are staged at once."""
    bank, direct = bank_of(stride, group_size), bank_of(stride, group_size)
    staged = StagedQueries(bank, torch.bfloat16)
    assert staged.capacity == bank.num_queries
    offsets = np.arange(3 * bank.period)
    late = np.where(offsets >= 5, bank.codes(2, offsets - 5), -1)
    run(staged, direct, np.stack([bank.codes(0, offsets), late], axis=1).tolist(), padding)
    run(staged, direct, [[int(code)] for code in bank.codes(0, offsets[:7])], padding)
    assert not equal(bank, direct)  # the newest are not in the bank yet
    staged.flush()
    assert equal(bank, direct) and direct.scales[:, [0, 2]].any()


def test_a_chunk_longer_than_what_is_staged_is_stored_at_once():
    bank, direct = bank_of(4), bank_of(4)
    staged = StagedQueries(bank, torch.bfloat16)
    run(staged, direct, [[0], [1], [-1]])
    run(staged, direct, [bank.codes(1, np.arange(bank.period)).tolist()])
    assert equal(bank, direct)
    run(staged, direct, [[2], [3, bank.period]])
    staged.flush()
    assert equal(bank, direct)


def test_a_step_that_was_not_captured_in_every_layer_is_dropped():
    bank, direct = bank_of(1), bank_of(1)
    staged = StagedQueries(bank, torch.bfloat16)
    for count in (1, bank.period):  # the second has a buffer of its own
        step = staged.steps(np.arange(count)[None])[0]
        query = torch.ones(count, bank.num_heads, HEAD_DIM, dtype=torch.bfloat16)
        staged.begin_step(step)
        staged.capture(0, query)
        staged.skip_step()
        staged.capture(1, query)
        staged.flush()
        assert not bank.scales.any()
    run(staged, direct, [[3]])
    staged.flush()
    assert equal(bank, direct) and bank.scales.any()
