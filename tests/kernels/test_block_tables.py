import numpy as np
import pytest
import torch

from kvllm.kernels.block_tables import shorten_block_tables, shorten_block_tables_ref
from kvllm.layout import Geometry


def make(policy, device, *, block_size=16, num_reqs=9, max_blocks=1400, seed=0):
    """Requests of all lengths, with window policy each with its own retention ratio; "history", "prompt": and a history
    limit, a prompt budget.

    returns the arguments of the kernel, and per request (geometry, prompt, computed)
    """
    rng = np.random.default_rng(seed)
    table = rng.permutation(num_reqs * max_blocks).reshape(num_reqs, max_blocks)
    requests = []
    for i in range(num_reqs):
        kept, candidates, interval = (8, 11, 3) if policy == "budget" else ([1, 5, 15][i % 3], 16, 16)
        limit, stay = ([3, 40, 5][i % 3], [1, 12, 5][i % 3]) if policy == "history" else (0, 0)
        geometry = Geometry(
            block_size=block_size,
            policy="budget" if policy == "budget" else "window",
            num_candidates=candidates * block_size,
            num_kept=kept * block_size,
            interval=interval * block_size,
            buffer_size=64,
            history_limit=limit * kept * block_size,
            history_kept=stay * kept * block_size,
            prompt_budget=10 * block_size * (policy == "prompt"),
        )
        prompt = int(rng.integers(1, 600))
        computed = prompt if i == 0 else int(rng.integers(prompt, block_size * max_blocks - 1))
        requests.append((geometry, prompt, computed))

    def column(values):
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    tensors = (
        torch.from_numpy(table).int().to(device),
        column(c + 1 for _, _, c in requests),
        column(-1 for _ in requests),
        column(-(-p // block_size) for _, p, _ in requests),
        column(g.num_events(p, c) for g, p, c in requests),
        column(g.num_kept // block_size for g, _, _ in requests),
        column(g.num_dropped_groups(g.num_events(p, c)) for g, p, c in requests),
        column(g.history_kept // g.num_kept for g, _, _ in requests),
        column(g.num_prompt_removed(p, 1) // block_size for g, p, _ in requests),
    )
    first = requests[0][0]
    constants = (first.num_candidates // block_size, first.interval // block_size, block_size, first.policy)
    return (*tensors, *constants), requests


def clone(arguments):
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize("policy", ["window", "history", "prompt", "budget"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_shorten_block_tables(policy, block_size, device):
    actual, _ = make(policy, device, block_size=block_size)
    expected = clone(actual)
    before = actual[0].clone()
    shorten_block_tables(*actual)
    shorten_block_tables_ref(*expected)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(actual[2], expected[2], rtol=0, atol=0)
    assert (actual[0] != before).any() and (actual[0][0] == before[0]).all()


@pytest.mark.parametrize("policy", ["window", "history", "prompt", "budget"])
def test_reference_is_the_geometry(policy, device):
    arguments, requests = make(policy, device)
    assert any(int(dropped) for dropped in arguments[6]) == (policy == "history")
    assert any(int(cut) for cut in arguments[8]) == (policy == "prompt")
    before = arguments[0].cpu().numpy()
    before = before.copy()
    shorten_block_tables_ref(*arguments)
    for row, original, length, (geometry, prompt, computed) in zip(
        arguments[0].cpu().numpy(), before, arguments[2].tolist(), requests, strict=True
    ):
        assert length == geometry.physical_len(prompt, computed) + 1
        num_blocks = -(-length // geometry.block_size)
        events = geometry.num_events(prompt, computed)
        logical = geometry.block_map(np.array([prompt]), np.array([events]), num_blocks)[0]
        np.testing.assert_array_equal(row[:num_blocks], original[logical])
        np.testing.assert_array_equal(row[num_blocks:], original[num_blocks:])


def test_lengths_in_place(device):
    arguments, _ = make("window", device)
    expected = clone(arguments)
    shorten_block_tables_ref(*expected)
    seq_lens = arguments[1]
    shorten_block_tables(arguments[0], seq_lens, seq_lens, *arguments[3:])
    torch.testing.assert_close(seq_lens, expected[2], rtol=0, atol=0)
