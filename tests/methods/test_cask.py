from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from kvllm.methods.cask import CASK
from kvllm.methods.keydiff import KeyDiff
from kvllm.methods.rope import unrotate
from tests.methods.test_all_methods import WINDOWS
from tests.methods.windows import random_window


def entries_by_loops(window, b, h, num_kept, method):
    """The kept entries of one head: (tokens merged, token kept, value), in text order."""
    score = method.scorer.score(window)[b, h].double()
    score = (score - score.mean()) / score.std(correction=0)
    num_core = min(round(method.core_share * num_kept), (num_kept - 1) // 2)
    core = sorted(range(window.num_tokens), key=lambda t: -score[t])[:num_core]
    keys = window.keys[b, :, h].float()
    if method.rope_theta is not None:
        keys = unrotate(keys, window.positions[b, h], method.rope_theta)
    links = []
    for t in range(window.num_tokens - 1):
        if t in core or t + 1 in core:
            continue
        cosine = float(torch.cosine_similarity(keys[t].double(), keys[t + 1].double(), dim=0))
        near = int(window.positions[b, h, t + 1] - window.positions[b, h, t]) <= method.max_gap
        tier = 2 if near and cosine >= method.min_similarity else 1 if near else 0
        links.append((-tier, -cosine, t))
    joined = {t for _, _, t in sorted(links)[: window.num_tokens - num_kept]}
    runs, run = [], [0]
    for t in range(1, window.num_tokens):
        if t - 1 in joined:
            run.append(t)
        else:
            runs.append(run)
            run = [t]
    runs.append(run)
    weight = softplus(score) + 1e-4
    values = window.values[b, :, h].double()
    return core, [
        (run, max(run, key=lambda t: score[t]), sum(weight[t] * values[t] for t in run) / sum(weight[t] for t in run))
        for run in runs
    ]


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1", "group_size 1"])
@pytest.mark.parametrize("num_kept", [1, 2, 9, 16, 23])
@pytest.mark.parametrize(
    "method",
    [
        CASK(base="h2o"),
        CASK(base="keydiff", core_share=0.2, min_similarity=0.3),
        CASK(base="recent", core_share=0.0, max_gap=5, rope_theta=100.0),
    ],
    ids=["h2o", "keydiff", "recent"],
)
def test_core_and_representatives_equal_the_definition(name, num_kept, method):
    window = WINDOWS[name]
    kept = method.compress(window, num_kept)
    for b in range(len(window.keys)):
        for h in range(window.num_kv_heads):
            core, entries = entries_by_loops(window, b, h, num_kept, method)
            assert kept.indices[b, h].tolist() == [best for _, best, _ in entries]
            assert set(core) <= {run[0] for run, _, _ in entries if len(run) == 1}
            expected = torch.stack([value for _, _, value in entries]).float()
            torch.testing.assert_close(kept.values[b, :, h], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(kept.keys[b, :, h], window.keys[b, kept.indices[b, h], h])


def test_what_is_not_merged_is_kept_bit_for_bit():
    window = random_window(num_tokens=40, dtype=torch.bfloat16)
    kept = CASK(base="keydiff").compress(window, 39)
    own = window.values.transpose(1, 2).gather(2, kept.indices.unsqueeze(-1).expand(-1, -1, -1, 8)).transpose(1, 2)
    assert kept.values is not None
    changed = kept.values.ne(own).any(dim=-1)
    assert changed.sum() <= changed.shape[0] * changed.shape[2]  # one merge a head


def test_the_same_token_twice_is_merged_into_itself():
    """Two equal pairs side by side cost one entry and lose nothing."""
    window = random_window(batch=1, num_tokens=20, num_kv_heads=1)
    window.keys[0, 12] = window.keys[0, 11]
    window.values[0, 12] = window.values[0, 11]
    kept = CASK(base="recent", core_share=0.0).compress(window, 19)
    assert kept.indices.tolist() == [[[t for t in range(20) if t != 11]]]
    expected = window.values[:, [t for t in range(20) if t != 11]]
    torch.testing.assert_close(kept.values, expected, rtol=0, atol=1e-6)


def test_far_tokens_are_merged_last():
    """Equal keys, but a gap in the text between 9 and 10: with 2 entries left the cut is there."""
    window = random_window(batch=1, num_tokens=20, num_kv_heads=1)
    positions = torch.cat([torch.arange(10), torch.arange(10) + 100])
    window = replace(window, keys=torch.ones_like(window.keys), positions=positions.view(1, 1, -1))
    assert CASK(base="recent", core_share=0.0).compress(window, 2).indices.tolist() == [[[9, 19]]]


def test_values_stay_within_their_sources():
    """Weights that sum to 1, also where scores are low (CASK's code shrinks such values)."""
    window = WINDOWS["window"]
    window = replace(window, values=torch.full_like(window.values, 3.0))
    kept = CASK(base="h2o").compress(window, 5)
    assert kept.values is not None
    torch.testing.assert_close(kept.values, torch.full_like(kept.values, 3.0))


def test_base_and_refusals():
    assert CASK(base="keydiff").scorer == KeyDiff()
    with pytest.raises(ValueError, match=r"core_share=0.6: must be a number in \[0, 0.5\]"):
        CASK(core_share=0.6)
    with pytest.raises(ValueError, match="max_gap=0: must be an integer"):
        CASK(max_gap=0)
    with pytest.raises(ValueError, match="rope_theta=0"):
        CASK(rope_theta=0)
    with pytest.raises(ValueError, match="base='kraa'.*did you mean 'kara'"):
        CASK(base="kraa")
