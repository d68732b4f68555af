import pytest
import torch

from kvllm.kernels.compact import compact_ref
from kvllm.kernels.queries import DueQueries
from kvllm.kernels.refit import refit, refit_ref
from kvllm.kernels.windows import gather_window_ref
from kvllm.methods.kara import Kara
from tests.kernels.paged_caches import assert_same_bits, copy_of
from tests.kernels.test_compact import random_kept
from tests.kernels.test_window_scores import make, rotation_of, window_of

# What one rounding to the cache's dtype can differ by, relative, and what the products differ by. On a GPU queries,
# weights and outputs are rounded to the dtype that it multiplies in; the interpreter multiplies in float32.
STEP = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float8_e4m3fn: 2**-3}
# Of the changes as stored, by their length: small ones are a few steps of the dtype.
LIMIT = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2, torch.float8_e4m3fn: 2e-1}


def assert_close(actual, expected, dtype):
    """All that the caches hold, compared as numbers; NaN outside of the candidates is the same on both sides."""
    for a, e in zip((*actual.keys, *actual.values), (*expected.keys, *expected.values), strict=True):
        # Of sums over many queries with operands rounded to 2^-9, the worst of some 50,000 numbers.
        rough = 1e-1 if a.is_cuda and dtype != torch.float32 else 1e-4
        a, e = a.float(), e.float()
        if dtype == torch.float8_e4m3fn:
            rough += 2**-9  # from one subnormal number to the next
            if not a.is_cuda:  # the interpreter rounds 1.99 to 1, without the carry, and subnormal numbers at will
                rough = 2**-6
                carry = (2 * a - e).abs() <= STEP[dtype] * e.abs()
                a = torch.where(carry & (a.frexp().mantissa.abs() == 0.5), 2 * a, a)
        torch.testing.assert_close(a, e, rtol=STEP[dtype] + rough, atol=rough, equal_nan=True)


def error_of_changes(actual, expected, moved):
    """Of what a refit adds to a cache, |kernel's - reference's| / |reference's|."""
    sides = [[t.double().nan_to_num() for t in (*c.keys, *c.values)] for c in (actual, expected, moved)]
    wrong = sum(float((a - e).square().sum()) for a, e, _ in zip(*sides, strict=True))
    return (wrong / sum(float((e - m).square().sum()) for _, e, m in zip(*sides, strict=True))) ** 0.5


@pytest.mark.parametrize("ridges", [(0.5, 0.0), (0.0, 0.5), (0.5, 2.0)])
@pytest.mark.parametrize(
    "num_candidates, num_kept, num_heads, num_kv_heads, head_dim, dtype, kv_dtype, options",
    [
        (64, 32, 3, 3, 64, torch.bfloat16, None, None),
        (96, 80, 8, 2, 128, torch.bfloat16, None, {}),
        (48, 16, 6, 3, 80, torch.float16, None, {"num_pairs": 20}),
        (80, 48, 4, 2, 96, torch.float16, None, {"interleaved": True}),
        (64, 32, 9, 3, 64, torch.float32, None, {"interleaved": True}),
        (48, 32, 14, 2, 80, torch.float32, None, None),
        (64, 48, 8, 2, 128, torch.bfloat16, torch.float8_e4m3fn, {}),
        (64, 32, 8, 2, 64, torch.bfloat16, None, {"by_layer": True}),
        (48, 32, 14, 2, 80, torch.float32, None, {"by_layer": True, "interleaved": True}),
    ],
)
def test_refit(num_candidates, num_kept, num_heads, num_kv_heads, head_dim, dtype, kv_dtype, options, ridges, device):
    stored = kv_dtype or dtype
    bank, starts, blocks, actual = make(
        num_candidates, num_heads, num_kv_heads, head_dim, dtype, device, num_queries=7, kv_dtype=stored
    )
    kept = random_kept(2, actual, num_candidates, num_kept, device)
    rotation = None if options is None else rotation_of(bank, head_dim, device, **options)
    expected, moved = copy_of(actual), copy_of(actual)

    refit(DueQueries(bank, starts, rotation), kept, blocks, actual, *ridges)
    refit_ref(DueQueries(bank, starts, rotation), kept, blocks, expected, *ridges)
    compact_ref(kept, blocks, moved)

    assert_close(actual, expected, stored)
    if stored != torch.float8_e4m3fn or actual.keys[0].is_cuda:  # the interpreter rounds to fp8 wrongly
        assert error_of_changes(actual, expected, moved) < LIMIT[stored]
    for layer in range(actual.num_layers):
        for ridge, a, m in zip(ridges, actual.raw(layer), moved.raw(layer), strict=True):
            assert torch.equal(a, m) == (ridge == 0)  # bit for bit


def test_more_requests_than_one_launch_takes(device, monkeypatch):
    bank, starts, blocks, actual = make(32, 4, 2, 64, torch.float32, device)
    kept = random_kept(2, actual, 32, 16, device)
    expected = copy_of(actual)
    for due in (0, 1):
        refit(DueQueries(bank, starts[due:][:1]), kept[due:][:1], blocks[due:][:1], expected, 1.0, 1.0)
    monkeypatch.setattr("kvllm.kernels.refit.launch._BATCH", 1)
    refit(DueQueries(bank, starts), kept, blocks, actual, 1.0, 1.0)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_strong_ridge_only_moves(dtype, device):
    bank, starts, blocks, actual = make(64, 4, 2, 64, dtype, device)
    kept = random_kept(2, actual, 64, 32, device)
    expected = copy_of(actual)
    refit(DueQueries(bank, starts), kept, blocks, actual, 1e9, 1e9)
    compact_ref(kept, blocks, expected)
    assert_close(actual, expected, dtype)


def test_queries_that_see_no_key_change_no_key(device):
    """Zeros, as in the bank of an engine that only compiles: attention is even, and no shift can change it."""
    bank, starts, blocks, actual = make(64, 4, 2, 64, torch.float32, device)
    bank.queries.zero_()
    kept = random_kept(2, actual, 64, 32, device)
    keys, values = gather_window_ref(blocks, actual, torch.float32)
    moved = copy_of(actual)
    refit(DueQueries(bank, starts), kept, blocks, actual, 1.0, 1e-6)
    compact_ref(kept, blocks, moved)
    assert all(torch.equal(actual.raw(layer)[0], moved.raw(layer)[0]) for layer in range(2))
    mean = gather_window_ref(blocks, actual, torch.float32)[1][:, :32].mean(dim=1)
    torch.testing.assert_close(mean, values.mean(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [Kara(key_ridge=1.0, value_ridge=0.5), Kara(value_ridge=1.0, lookahead=0)])
def test_reference_is_kara(method, device):
    bank, starts, blocks, cache = make(64, 6, 3, 80, torch.float32, device)
    window, rotation = window_of(method, bank, starts, blocks, cache)
    expected = method.compress(window, 16)
    kept = expected.indices.int().unflatten(0, (2, cache.num_layers)).contiguous()
    refit_ref(DueQueries(bank, starts, rotation), kept, blocks, cache, method.key_ridge, method.value_ridge)
    keys, values = gather_window_ref(blocks, cache, torch.float32)
    torch.testing.assert_close(keys[:, :16], expected.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values[:, :16], expected.values, rtol=1e-4, atol=1e-4)


def test_nothing_due(device):
    bank, starts, blocks, cache = make(64, 4, 2, 64, torch.bfloat16, device)
    expected = copy_of(cache)
    kept = torch.empty(0, 2, 2, 16, dtype=torch.int32, device=device)
    refit(DueQueries(bank, starts[:0]), kept, blocks[:0], cache, 1.0, 1.0)
    assert_same_bits(cache, expected)
