from __future__ import annotations

import pytest
import torch

from kvllm.methods.chunkkv import ChunkKV
from kvllm.methods.h2o import H2O
from kvllm.methods.keydiff import KeyDiff
from kvllm.methods.snapkv import SnapKV
from tests.methods.test_all_methods import WINDOWS
from tests.methods.windows import random_window


def kept_by_loops(scores, num_kept, chunk_length):
    """scores [num_kv_heads, num_tokens]: whole chunks, best first, then the best tokens of the next one."""
    shared = scores.double().sum(dim=0).tolist()
    chunks = [list(range(i, min(i + chunk_length, len(shared)))) for i in range(0, len(shared), chunk_length)]
    kept: list[int] = []
    for chunk in sorted(chunks, key=lambda c: -sum(shared[t] for t in c) / len(c)):
        room = num_kept - len(kept)
        kept += chunk if len(chunk) <= room else sorted(chunk, key=lambda t: -shared[t])[:room]
    return sorted(kept)


@pytest.mark.parametrize("name", ["window", "budget", "num_kv_heads 1"])
@pytest.mark.parametrize("chunk_length", [1, 5, 8, 100])
@pytest.mark.parametrize("num_kept", [1, 10, 16, 23])
def test_whole_chunks_stay(name, chunk_length, num_kept):
    window = WINDOWS[name]
    kept = ChunkKV(base="keydiff", chunk_length=chunk_length).compress(window, num_kept).indices
    base = KeyDiff().score(window)
    for b in range(len(window.keys)):
        expected = kept_by_loops(base[b], num_kept, chunk_length)
        assert kept[b].tolist() == [expected] * window.num_kv_heads


def test_a_short_last_chunk_competes_by_its_mean():
    window = random_window(batch=1, num_tokens=10, num_kv_heads=1)
    window.keys[:] = 1.0
    window.keys[0, 8:] = -1.0  # two tokens unlike the eight others: the best chunk, though the shortest
    kept = ChunkKV(base="keydiff", chunk_length=4).compress(window, 2).indices
    assert kept.tolist() == [[[8, 9]]]


def test_the_base_and_its_options():
    assert ChunkKV().scorer == SnapKV()
    assert ChunkKV(base="h2o", base_options={"average": True}).scorer == H2O(average=True)
    assert torch.equal(ChunkKV(base="recent").compress(WINDOWS["window"], 3).indices[0, 0], torch.tensor([21, 22, 23]))


def test_refusals():
    with pytest.raises(ValueError, match="base='snapvk': no such method; did you mean 'snapkv'"):
        ChunkKV(base="snapvk")
    with pytest.raises(ValueError, match="base_options of snapkv: width=3: no such option; options are num_obs"):
        ChunkKV(base_options={"width": 3})
    with pytest.raises(ValueError, match="kernel_size=4: must be odd"):
        ChunkKV(base_options={"kernel_size": 4})
    with pytest.raises(ValueError, match="base_options=3: must be a mapping of names to values, not an integer"):
        ChunkKV(base_options=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_length=0: must be an integer >= 1"):
        ChunkKV(chunk_length=0)
