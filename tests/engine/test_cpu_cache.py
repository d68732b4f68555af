"""Rows of vLLM's CPU cache are put into the order of the text, however they are packed."""

import pytest
import torch

from kvllm.engine.cpu_cache import PackedReader

BLOCK_SIZE, HEAD_DIM = 4, 6


@pytest.mark.parametrize("packing", ["plain", "transposed", "pairs", "any"])
def test_packings(packing):
    text = torch.arange(5 * BLOCK_SIZE * HEAD_DIM).view(5, BLOCK_SIZE, HEAD_DIM)
    plain = torch.arange(BLOCK_SIZE * HEAD_DIM).view(BLOCK_SIZE, HEAD_DIM)
    stored = {  # the index in the text of each stored element
        "plain": plain,
        "transposed": plain.T,
        "pairs": plain.view(BLOCK_SIZE, HEAD_DIM // 2, 2).transpose(0, 1),  # with AMX
        "any": torch.randperm(plain.numel(), generator=torch.Generator().manual_seed(0)),
    }[packing].flatten()
    reader = object.__new__(PackedReader)
    reader.block_size, reader.head_dim = BLOCK_SIZE, HEAD_DIM
    rows = text.flatten(1)[:, stored]
    assert torch.equal(reader._in_text_order(rows, stored.argsort()), text)
