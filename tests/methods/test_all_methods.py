"""Requirements on every registered method: a new one is tested by being registered."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from safetensors.torch import save_file

from kvllm.config import KvConfig
from kvllm.methods import make_method, methods
from kvllm.methods.base import Method, Window
from kvllm.methods.gates import Gated
from kvllm.methods.rope import Rope, frequencies
from kvllm.methods.triattention import save_statistics
from tests.methods.test_gates import random_gates
from tests.methods.windows import one_of, random_window, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")

# What random_window makes by default.
NUM_HEADS, HEAD_DIM, NUM_LAYERS = 6, 8, 5


@pytest.fixture(scope="module")
def needed_options(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("statistics") / "model.safetensors")
    queries = torch.randn(NUM_LAYERS, NUM_HEADS, 50, HEAD_DIM, generator=torch.Generator().manual_seed(1)) + 0.5
    save_statistics(path, queries, 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    return {"triattention": {"statistics": path}} | dict.fromkeys(("trimkv", "dms"), {"gates": gates_of(2)})


@functools.cache
def gates_of(num_kv_heads: int) -> str:
    """A file of gates for random windows with so many KV heads."""
    path = f"{tempfile.mkdtemp()}/gates.safetensors"
    save_file(random_gates(NUM_LAYERS, num_kv_heads, HEAD_DIM, hidden=3), path)
    return path


def fitting(method: Method, window: Window) -> Method:
    """The method with gates, if it has any, for the KV heads of this window."""
    if not isinstance(method, Gated):
        return method
    name = next(name for name, cls in methods().items() if isinstance(method, cls))
    return make_method(KvConfig(method=name, method_options={"gates": gates_of(window.num_kv_heads)}))


@pytest.fixture(params=list(methods()))
def method(request, needed_options):
    return make_method(KvConfig(method=request.param, method_options=needed_options.get(request.param, {})))


def window_of_the_budget_policy() -> Window:
    """Candidates that earlier cuts have thinned, for each head differently; the newest lie side by side."""
    window = random_window(batch=3, num_tokens=48, num_kv_heads=2, group_size=3, head_dim=HEAD_DIM)
    generator = torch.Generator().manual_seed(5)
    positions = torch.stack([torch.randperm(300, generator=generator)[:30].sort().values for _ in range(6)])
    old = positions.view(3, 2, 30) + 64
    new = torch.arange(364, 364 + 18).expand(3, 2, -1)
    return replace(window, positions=torch.cat([old, new], dim=-1))


def windows() -> dict[str, Window]:
    window = random_window(batch=3)
    return {
        "window": window,
        "budget": window_of_the_budget_policy(),
        "bfloat16": random_window(batch=3, dtype=torch.bfloat16),
        "num_kv_heads 1": random_window(num_kv_heads=1, group_size=6, head_dim=HEAD_DIM),
        "group_size 1": random_window(num_kv_heads=6, group_size=1, head_dim=HEAD_DIM),
        "no RoPE and no turns": replace(window, query_shifts=None, rope=None),
        "interleaved RoPE of half the dimensions": replace(window, rope=Rope(frequencies(50.0, 4), interleaved=True)),
        "some queries before the window": replace(window, query_positions=torch.tensor([26, -9, 4, -1, 20])),
        "equal tokens": replace(window, keys=torch.ones_like(window.keys), values=torch.ones_like(window.values)),
        "zeros": replace(
            window,
            queries=torch.zeros_like(window.queries),
            keys=torch.zeros_like(window.keys),
            values=torch.zeros_like(window.values),
        ),
    }


WINDOWS = windows()


@pytest.mark.parametrize("name", WINDOWS)
def test_exactly_num_kept_distinct_ascending(method, name):
    window = WINDOWS[name]
    method = fitting(method, window)
    for num_kept in (1, 2, 7, 16, window.num_tokens - 1):
        kept = method.compress(window, num_kept)
        assert kept.indices.dtype == torch.int64
        assert kept.indices.shape == (len(window.keys), window.num_kv_heads, num_kept)
        assert (kept.indices.diff(dim=-1) > 0).all()
        assert kept.indices.min() >= 0 and kept.indices.max() < window.num_tokens
        for new in (kept.keys, kept.values):
            if new is not None:
                assert new.dtype == window.keys.dtype and new.isfinite().all()
                assert new.shape == (len(window.keys), num_kept, *window.keys.shape[2:])


@pytest.mark.parametrize("name", WINDOWS)
def test_scores_have_the_promised_shape_and_type(method, name):
    window = WINDOWS[name]
    scores = fitting(method, window).score(window)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(window.keys), window.num_kv_heads, window.num_tokens)
    assert not scores.isnan().any()


@pytest.mark.parametrize("name", ["window", "budget", "bfloat16"])
def test_a_batch_equals_its_members_bit_for_bit(method, name):
    window = WINDOWS[name]
    scores, kept = method.score(window), method.compress(window, 9)
    for i in range(len(window.keys)):
        alone = method.compress(one_of(window, i), 9)
        torch.testing.assert_close(method.score(one_of(window, i)), scores[i : i + 1], rtol=0, atol=0)
        assert torch.equal(alone.indices, kept.indices[i : i + 1])
        if kept.values is not None:
            assert torch.equal(alone.values, kept.values[i : i + 1])


@pytest.mark.parametrize("name", ["window", "budget"])
def test_the_order_of_the_query_ring_does_not_matter(method, name):
    """The same queries in other entries of the ring: the same tokens are kept."""
    window = WINDOWS[name]
    entries = torch.tensor([3, 0, 4, 1, 2])
    shuffled = replace(window, queries=window.queries[:, entries], query_positions=window.query_positions[entries])
    # Sums over queries may round differently in another order.
    torch.testing.assert_close(method.score(shuffled), method.score(window), rtol=1e-5, atol=1e-6)


def test_the_input_is_left_alone(method):
    window = random_window(head_dim=HEAD_DIM)
    before = tensors_of(window)
    method.compress(window, 5)
    for name, tensor in tensors_of(window).items():
        assert torch.equal(tensor, before[name]), name


def test_a_method_is_frozen_and_its_options_have_defaults(method):
    for f in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, f.name, None)
    assert method == type(method)(**{f.name: getattr(method, f.name) for f in fields(method)})


def test_a_method_says_what_it_keeps(method):
    assert (type(method).__doc__ or "").startswith(("Keep ", "Cut "))
