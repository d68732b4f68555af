from typing import Any

import numpy as np
import pytest
import torch

from kvllm.config import KvConfig
from kvllm.kernels.block_tables import join_segments, join_segments_ref
from kvllm.layout import Geometry

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "window": [{"retention_ratio": r} for r in (1 / 8, 0.3, 0.95)],
    "history": [{"retention_ratio": 0.3, "history_size": size} for size in (512, 2048, 5000)],
    "prompt": [{"prompt_budget": 160}],
    "budget": [{"policy": "budget", "window_size": 32, "budget_size": 128, "budget_interval": 64}],
}


def make(policy, device, *, block_size=16, num_reqs=9, max_blocks=1400, seed=0):
    """Requests of all lengths, each with its own geometry.

    returns the arguments of the kernel, and per request (geometry, prompt, computed)
    """
    rng = np.random.default_rng(seed)
    table = rng.permutation(num_reqs * max_blocks).reshape(num_reqs, max_blocks)
    survivors = -1 - rng.permutation(num_reqs * max_blocks).reshape(num_reqs, max_blocks)
    requests, plan = [], np.full((4, num_reqs + 3), 7)  # entries past the requests mean nothing
    rows = rng.permutation(num_reqs)
    for i in range(num_reqs):
        options = CONFIGS[policy][i % len(CONFIGS[policy])]
        geometry = Geometry.from_config(KvConfig(method="recent", **options), block_size)
        assert geometry is not None
        prompt = int(rng.integers(1, 600))
        computed = prompt if i == 0 else int(rng.integers(prompt, block_size * max_blocks - 1))
        events = geometry.num_events(prompt, computed)
        numbers = (geometry.prompt_len, geometry.prefix_len, geometry.tail_start)
        plan[:3, i] = [number(prompt, events) // block_size if events else 0 for number in numbers]
        plan[3, i] = rows[i]
        requests.append((geometry, prompt, computed))
    lengths = torch.tensor([c + 1 for _, _, c in requests], dtype=torch.int32, device=device)
    on_device = [torch.from_numpy(x).int().to(device) for x in (table, survivors, plan)]
    return (on_device[0], lengths, torch.full_like(lengths, -1), *on_device[1:], block_size), requests


def clone(arguments):
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize("policy", CONFIGS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_join_segments(policy, block_size, device):
    """1,400 blocks of a request are several of the kernel's tiles."""
    arguments, _ = make(policy, device, block_size=block_size, seed=block_size)
    actual, expected = clone(arguments), clone(arguments)
    join_segments(*actual)
    join_segments_ref(*expected)
    for mine, theirs in zip(actual[:3], expected[:3], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("policy", CONFIGS)
def test_the_reference_reads_what_the_layout_says(policy):
    arguments, requests = make(policy, "cpu")
    table, _, lengths, survivors, plan, block_size = clone(arguments)
    before = table.clone()
    join_segments_ref(table, arguments[1], lengths, survivors, plan, block_size)
    for i, (geometry, prompt, computed) in enumerate(requests):
        events = geometry.num_events(prompt, computed)
        length = geometry.physical_len(prompt, computed) + 1
        assert int(lengths[i]) == length
        count = -(-length // block_size)
        if events:
            front, prefix, tail = (
                n // block_size
                for n in (
                    geometry.prompt_len(prompt, events),
                    geometry.prefix_len(prompt, events),
                    geometry.tail_start(prompt, events),
                )
            )
            own = survivors[plan[3, i], front:prefix].tolist()
            expected = [*before[i, :front].tolist(), *own, *before[i, tail:].tolist()]
        else:
            expected = before[i].tolist()
        assert table[i, :count].tolist() == expected[:count]


def test_lengths_in_place(device):
    arguments, _ = make("window", device)
    table, seq_lens, out, *rest = clone(arguments)
    expected = clone(arguments)
    join_segments_ref(*expected)
    join_segments(table, seq_lens, seq_lens, *rest)
    assert torch.equal(seq_lens, expected[2]) and torch.equal(table, expected[0])


def test_no_requests(device):
    arguments, _ = make("window", device)
    table, lengths, out, *rest = arguments
    join_segments(table[:0], lengths[:0], out[:0], *rest)
