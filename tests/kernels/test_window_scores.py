import pytest
import torch

from kvllm.compression.query_bank import QueryBank, quantize
from kvllm.kernels.queries import DueQueries
from kvllm.kernels.window_scores import window_scores, window_scores_ref
from kvllm.kernels.window_scores.launch import tile_sizes
from kvllm.kernels.windows import gather_window_ref
from kvllm.methods.base import Window
from kvllm.methods.kara import Kara, ahead_distances
from kvllm.methods.rope import Rope, frequencies
from tests.kernels.paged_caches import random_blocks, random_cache


def assert_scores_close(actual, expected, rotated_in=None):
    # Without a rotation the operands are exact on both sides; what is left is float32 against float64: sums of a few
    # hundred exponentials of logits up to about 5, each within a few units of 2^-24 (exp2 on the GPU: 2 ulp). A rotated
    # query is rounded to the dtype that the GPU multiplies in, `rotated_in`: a logit of 5 is then off by up to 5 * 2^-9
    # in bfloat16, and 2^-12 in float16; the interpreter multiplies in float32.
    rounding = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(rotated_in, 0.0) if actual.is_cuda else 0.0
    torch.testing.assert_close(actual, expected, rtol=2e-5 + rounding, atol=1e-8)


def make(num_candidates, num_heads, num_kv_heads, head_dim, dtype, device, *, block_size=16, num_queries=5, **kwargs):
    """bank, ring_starts, candidate_blocks, cache of 2 due requests; rows of other requests are NaN."""
    torch.manual_seed(1)
    blocks_each = num_candidates // block_size
    cache = random_cache(
        num_blocks=2 * blocks_each + 3,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=kwargs.pop("kv_dtype", dtype),
        device=device,
        **kwargs,
    )
    bank = QueryBank.allocate(cache.num_layers, 4, num_queries, num_heads, num_kv_heads, head_dim, 4, dtype, device)
    numbers, scales = quantize(torch.randn(*bank.scales.shape, head_dim, device=device), bank.queries.dtype)
    bank.queries.copy_(numbers)
    bank.scales.copy_(scales)
    starts = torch.tensor([bank.ring_start(3, 2), bank.ring_start(1, num_queries - 1)], device=device)
    bank.scales[:, [0, 2]] = torch.nan
    return bank, starts, random_blocks(2, blocks_each, 2 * blocks_each + 3, device), cache


def window_of(method, bank, starts, blocks, cache):
    """What a method sees of a float32 cache, and how it rotates its queries."""
    keys, values = gather_window_ref(blocks, cache, torch.float32)
    num_tokens, num_kv_heads, head_dim = keys.shape[1:]
    rope = Rope(frequencies(10000.0, head_dim, keys.device))
    window = Window(
        queries=bank.of(starts).transpose(0, 1).flatten(0, 1),
        query_positions=torch.tensor([63, 67, 71, 75, 79], device=keys.device),
        keys=keys,
        values=values,
        positions=torch.arange(num_tokens, device=keys.device).expand(len(keys), num_kv_heads, -1),
        layers=torch.arange(cache.num_layers, device=keys.device).repeat(len(starts)),
        query_shifts=bank.shifts,
        rope=rope,
    )
    if not method.uses_rope:
        return window, None
    distances = ahead_distances(window.query_positions, window.query_shifts, method.lookahead)
    return window, rope.rotation(distances.unsqueeze(1), head_dim)


@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize(
    "num_candidates, num_heads, num_kv_heads, head_dim, dtype",
    [
        (64, 3, 3, 64, torch.bfloat16),
        (256, 32, 8, 128, torch.bfloat16),
        (48, 6, 3, 80, torch.float16),
        (96, 4, 2, 96, torch.bfloat16),
        (64, 2, 1, 256, torch.float16),
        (64, 9, 3, 64, torch.float32),
    ],
)
def test_window_scores(num_candidates, num_heads, num_kv_heads, head_dim, dtype, value_norm, device):
    bank, starts, blocks, cache = make(num_candidates, num_heads, num_kv_heads, head_dim, dtype, device)
    actual = window_scores(DueQueries(bank, starts), blocks, cache, value_norm)
    assert_scores_close(actual, window_scores_ref(DueQueries(bank, starts), blocks, cache, value_norm))


@pytest.mark.parametrize(
    "num_candidates, head_dim, dtype, block_size",
    [(544, 128, torch.bfloat16, 32), (160, 80, torch.float32, 16), (272, 256, torch.float16, 16)],
)
def test_candidates_of_several_tiles(num_candidates, head_dim, dtype, block_size, device):
    assert tile_sizes(num_candidates, 70, 256, dtype == torch.float32)[0] < num_candidates
    bank, starts, *where = make(num_candidates, 14, 2, head_dim, dtype, device, block_size=block_size, num_queries=10)
    queries = DueQueries(bank, starts)
    assert_scores_close(window_scores(queries, *where), window_scores_ref(queries, *where))


@pytest.mark.parametrize("num_candidates", [64, 320])
@pytest.mark.parametrize("token_major", [True, False])
def test_fp8_cache(num_candidates, token_major, device):
    bank, starts, *where = make(
        *(num_candidates, 8, 2, 128, torch.bfloat16, device), kv_dtype=torch.float8_e4m3fn, token_major=token_major
    )
    # Every e4m3 value is a bf16 value, so dequantising adds no error.
    queries = DueQueries(bank, starts)
    assert_scores_close(window_scores(queries, *where), window_scores_ref(queries, *where))


def rotation_of(bank, head_dim, device, interleaved=False, num_pairs=None, by_layer=False):
    num_pairs = num_pairs or head_dim // 2
    rope = Rope(100.0 ** -(torch.arange(num_pairs, dtype=torch.float64, device=device) / num_pairs), interleaved)
    if by_layer:  # the first has none
        still = torch.zeros_like(rope.frequencies)
        slower = [rope.frequencies / i for i in range(1, len(bank.queries))]
        rope = Rope(torch.stack([still, *slower]), interleaved)
    distances = torch.randint(0, 500, (bank.num_queries, 1, bank.group_size), device=device)
    return rope.rotation(distances, head_dim)


@pytest.mark.parametrize("keydiff_power", [0.0, 1.5, 2.0])
@pytest.mark.parametrize(
    "num_candidates, num_heads, num_kv_heads, head_dim, dtype, options",
    [
        (64, 6, 3, 64, torch.bfloat16, {}),
        (256, 32, 8, 128, torch.bfloat16, {}),
        (48, 6, 3, 80, torch.float16, {"num_pairs": 20}),
        (64, 9, 3, 64, torch.float32, {"interleaved": True}),
        (544, 14, 2, 128, torch.bfloat16, {}),
        (160, 8, 2, 80, torch.float32, {"interleaved": True, "num_pairs": 16}),
        (64, 6, 3, 64, torch.bfloat16, {"by_layer": True}),
        (544, 14, 2, 80, torch.bfloat16, {"by_layer": True, "num_pairs": 20}),
    ],
)
def test_rotated_queries_and_distinct_keys(
    num_candidates, num_heads, num_kv_heads, head_dim, dtype, options, keydiff_power, device
):
    bank, starts, blocks, cache = make(num_candidates, num_heads, num_kv_heads, head_dim, dtype, device, num_queries=10)
    rotation = rotation_of(bank, head_dim, device, **options)
    queries = DueQueries(bank, starts, rotation)
    actual = window_scores(queries, blocks, cache, keydiff_power=keydiff_power)
    expected = window_scores_ref(queries, blocks, cache, keydiff_power=keydiff_power)
    assert_scores_close(actual, expected, rotated_in=dtype)
    still = window_scores_ref(DueQueries(bank, starts), blocks, cache, keydiff_power=keydiff_power)
    assert not torch.allclose(expected, still, rtol=0.1)
    assert torch.equal(expected[:, 0], still[:, 0]) == ("by_layer" in options)


@pytest.mark.parametrize("num_candidates", [64, 288])
def test_attention_floor(num_candidates, device):
    bank, starts, blocks, cache = make(num_candidates, 4, 2, 128, torch.bfloat16, device)
    actual = window_scores(DueQueries(bank, starts), blocks, cache, attention_floor=3.0)
    assert_scores_close(actual, window_scores_ref(DueQueries(bank, starts), blocks, cache, attention_floor=3.0))
    assert (actual > 1.5 * window_scores_ref(DueQueries(bank, starts), blocks, cache)).any()


def test_large_logits_do_not_overflow(device):
    bank, starts, blocks, cache = make(64, 4, 2, 64, torch.bfloat16, device)
    bank.scales.mul_(100)
    scores = window_scores(DueQueries(bank, starts), blocks, cache)
    # Logits in the hundreds lose as many digits after the point.
    torch.testing.assert_close(scores, window_scores_ref(DueQueries(bank, starts), blocks, cache), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", [Kara(), Kara(keydiff_power=0.0), Kara(lookahead=0, value_norm=False)])
def test_reference_is_kara(method, device):
    bank, starts, blocks, cache = make(64, 6, 3, 80, torch.float32, device)
    window, rotation = window_of(method, bank, starts, blocks, cache)
    expected = method.score(window).unflatten(0, (2, cache.num_layers))
    options = (method.value_norm, method.keydiff_power, method.attention_floor)
    actual = window_scores_ref(DueQueries(bank, starts, rotation), blocks, cache, *options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-8)


def test_nothing_due(device):
    bank, starts, blocks, cache = make(64, 4, 2, 64, torch.bfloat16, device)
    assert window_scores(DueQueries(bank, starts[:0]), blocks[:0], cache).shape == (0, 2, 2, 64)
