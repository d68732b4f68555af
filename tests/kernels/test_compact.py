import pytest
import torch

from kvllm.kernels.compact import compact, compact_ref
from tests.kernels.paged_caches import assert_same_bits, copy_of, random_blocks, random_cache


def random_kept(num_due, cache, num_candidates, num_kept, device):
    """[num_due, num_layers, num_kv_heads, num_kept] int32, ascending, for every head its own."""
    order = torch.rand(num_due, cache.num_layers, cache.num_kv_heads, num_candidates).argsort(dim=-1)
    return order[..., :num_kept].sort(dim=-1).values.int().to(device)


@pytest.mark.parametrize("token_major", [True, False])
@pytest.mark.parametrize(
    "num_kept, num_candidates, block_size, num_kv_heads, head_dim, dtype",
    [
        (16, 64, 16, 1, 64, torch.bfloat16),
        (80, 256, 16, 3, 128, torch.bfloat16),
        (32, 96, 32, 3, 80, torch.float8_e4m3fn),
        (208, 256, 16, 2, 96, torch.float16),
        (48, 64, 16, 2, 80, torch.float32),
        (64, 128, 32, 1, 256, torch.float16),
        (32, 64, 32, 1, 512, torch.bfloat16),
    ],
)
def test_compact(num_kept, num_candidates, block_size, num_kv_heads, head_dim, dtype, token_major, device):
    torch.manual_seed(2)
    blocks_each = num_candidates // block_size
    actual = random_cache(
        num_blocks=2 * blocks_each + 3,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        token_major=token_major,
    )
    if dtype == torch.bfloat16:  # bit for bit: a NaN's payload as well
        actual.raw(0)[0].view(torch.int16)[..., 0] = 0x7F81
    expected = copy_of(actual)
    blocks = random_blocks(2, blocks_each, 2 * blocks_each + 3, device)
    kept = random_kept(2, actual, num_candidates, num_kept, device)
    survivors = actual.raw(1)[1][blocks[1].long()].flatten(0, 1)[kept[1, 1, 0].long(), 0].clone()

    compact(kept, blocks, actual)
    compact_ref(kept, blocks, expected)

    assert_same_bits(actual, expected)
    moved = expected.raw(1)[1][blocks[1].long()].flatten(0, 1)[:num_kept, 0]
    torch.testing.assert_close(moved, survivors, rtol=0, atol=0)


def test_the_last_tokens_move_over_the_first(device):
    """Every source is itself a target of another row: the order of reads and writes matters most."""
    cache = random_cache(num_blocks=16, block_size=16, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16, device=device)
    expected = copy_of(cache)
    blocks = random_blocks(1, 16, 16, device)
    kept = torch.arange(1, 241, dtype=torch.int32, device=device).expand(1, 2, 2, 240).contiguous()
    compact(kept, blocks, cache)
    compact_ref(kept, blocks, expected)
    assert_same_bits(cache, expected)


def test_nothing_due(device):
    cache = random_cache(num_blocks=4, block_size=16, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16, device=device)
    expected = copy_of(cache)
    empty = torch.empty(0, 2, 2, 16, dtype=torch.int32, device=device)
    compact(empty, torch.empty(0, 4, dtype=torch.int32, device=device), cache)
    assert_same_bits(cache, expected)
