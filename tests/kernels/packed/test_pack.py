from __future__ import annotations

import pytest
import torch

from kvllm.compression.rounding import Rounding, packed_block_tokens
from kvllm.kernels.packed.layout import PackedLayout, as_words, read_block_ref
from kvllm.kernels.packed.pack import pack, pack_ref
from kvllm.kernels.windows import gather_window_ref
from tests.kernels.paged_caches import assert_same_bits, cache_dtype_of, copy_of, random_blocks, random_cache

SHAPES = [
    # block_size, num_kv_heads, head_dim, units, num_due, dtype, token_major
    (16, 2, 128, 4, 2, torch.bfloat16, False),
    (16, 1, 64, 1, 1, torch.bfloat16, True),
    (16, 3, 256, 2, 3, torch.float16, False),
    (32, 2, 64, 2, 1, torch.float32, True),
    (16, 2, 96, 3, 1, torch.bfloat16, False),
    (32, 2, 128, 2, 1, torch.float8_e4m3fn, False),
    (16, 1, 64, 3, 1, torch.float8_e4m3fn, True),
]


@pytest.mark.parametrize("block_size, num_kv_heads, head_dim, units, num_due, dtype, token_major", SHAPES)
def test_pack(block_size, num_kv_heads, head_dim, units, num_due, dtype, token_major, device):
    rounding = Rounding(4, packed_block_tokens(block_size, head_dim, 4, cache_dtype_of(dtype)))
    blocks_each = -(-units * rounding.block_tokens // block_size)
    cache = random_cache(
        num_blocks=num_due * blocks_each + 2, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype, device=device, token_major=token_major,
    )  # fmt: skip
    blocks = random_blocks(num_due, blocks_each, num_due * blocks_each + 2, device)
    num_kept = units * rounding.block_tokens
    kept = [t[:, :num_kept] for t in gather_window_ref(blocks, cache, torch.float32)]
    wanted = rounding.round_trip(*kept)
    expected = copy_of(cache)
    pack_ref(blocks, num_kept, expected, rounding)
    pack(blocks, num_kept, cache, rounding)
    assert_same_bits(cache, expected)
    layout = PackedLayout.of(cache, rounding)
    for layers, numbers, by_channel in ((cache.keys, wanted[0], True), (cache.values, wanted[1], False)):
        for layer in range(cache.num_layers):
            for due in range(num_due):
                found = read_block_ref(as_words(layers[layer]), blocks[due, :units].long(), layout, by_channel)
                torch.testing.assert_close(found.flatten(0, 1), numbers[due * cache.num_layers + layer], rtol=0, atol=0)


def test_blocks_that_would_hold_too_little_are_refused(device):
    cache = random_cache(
        num_blocks=2, block_size=16, num_kv_heads=1, head_dim=64, dtype=torch.float8_e4m3fn, device=device
    )
    with pytest.raises(ValueError, match="does not fit"):
        PackedLayout.of(cache, Rounding(4, packed_block_tokens(16, 64, 4)))
