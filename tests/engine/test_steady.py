"""Steps that go on as before give what working everything out again gives."""

import numpy as np
import torch

from kvllm.compression.staged_queries import StepQueries
from kvllm.engine.steady import JoinedTables, SteadyBatch
from kvllm.kernels.block_tables import join_segments_ref

BLOCK_SIZE = 4
PLAN = torch.tensor([[2, 0, 1], [5, 0, 3], [9, 0, 6], [1, 0, 2]], dtype=torch.int32)  # the second has had no event
NUM_REMOVED = np.array([4 * BLOCK_SIZE, 0, 3 * BLOCK_SIZE])


def tables(steps: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logical tables and lengths after some steps, in which all three requests get further blocks at some time."""
    lengths = torch.tensor([41, 6, 31], dtype=torch.int32) + steps
    columns = torch.arange(40, dtype=torch.int32)
    own = 1000 * torch.arange(1, 4, dtype=torch.int32)[:, None] + columns
    own[columns * BLOCK_SIZE >= lengths[:, None]] = -7  # not allocated yet
    pad = torch.nn.functional.pad
    return pad(own, (0, 0, 0, padding)), pad(lengths, (0, padding))


def joined(table: torch.Tensor, lengths: torch.Tensor, survivors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table, out = table.clone(), lengths.clone()
    join_segments_ref(table, lengths[:3], out, survivors, PLAN, BLOCK_SIZE)
    return table, out


def test_joined_tables_grow_as_if_joined_anew():
    survivors = 5000 + torch.arange(3 * 40, dtype=torch.int32).view(3, 40)
    first = tables(0)
    kept = JoinedTables(*first, NUM_REMOVED, survivors, PLAN, BLOCK_SIZE)
    for steps in range(1, 30):
        table, lengths = tables(steps)
        for _ in range(2):  # vLLM may ask more than once a step
            assert kept.extend(table, lengths)
        expected, expected_lengths = joined(table, lengths, survivors)
        assert torch.equal(kept.seq_lens, expected_lengths)
        for mine, theirs, length in zip(kept.block_table, expected, expected_lengths.tolist(), strict=True):
            read = -(-length // BLOCK_SIZE)
            assert torch.equal(mine[:read], theirs[:read]) and (mine[:read] >= 1000).all()
    assert torch.equal(first[0], tables(0)[0])  # the runner's own table stays as it is


def test_padded_tables_are_joined_but_not_extended():
    survivors = torch.zeros(3, 40, dtype=torch.int32)
    first = tables(0, padding=2)
    kept = JoinedTables(*first, NUM_REMOVED, survivors, PLAN, BLOCK_SIZE)
    for mine, expected in zip((kept.block_table, kept.seq_lens), joined(*first, survivors), strict=True):
        assert torch.equal(mine, expected)
    assert not kept.extend(*tables(1, padding=2)) and not kept.extend(*tables(1))
    assert torch.equal(kept.seq_lens, joined(*first, survivors)[1])


def test_only_the_next_step_of_the_same_requests_goes_on():
    def batch() -> SteadyBatch:
        coming = [StepQueries(2, None, np.array([code, code])) for code in (2, 1)]
        return SteadyBatch(["a", "b"], None, [7, 30], coming)

    steady = batch()
    for ahead, code in enumerate((1, 2)):
        step = steady.next_step(["a", "b"], [7 + ahead, 30 + ahead], 2)
        assert step is not None and step.codes.tolist() == [code, code]
    assert steady.next_step(["a", "b"], [9, 32], 2) is None  # an event, or more steps than were planned
    assert batch().next_step(["b", "a"], [7, 30], 2) is None
    assert batch().next_step(["a"], [7], 1) is None
    assert batch().next_step(["a", "b"], [7, 31], 2) is None  # a request that went on elsewhere, or back
    assert batch().next_step(["a", "b"], [7, 30], 3) is None  # a chunk
