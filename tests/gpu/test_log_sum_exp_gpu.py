"""What vLLM's FlashAttention hands out besides its output, on which merging packed survivors relies. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

BLOCK_SIZE = 32
LENGTHS = [1, 31, 200, 900]  # of the cached texts
SOFT_CAP = 4.0


def paged(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[num_blocks, BLOCK_SIZE, num_kv_heads, head_dim] with the texts' blocks in no order, and their table."""
    counts = [-(-len(row) // BLOCK_SIZE) for row in rows]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(0)).tolist()
    cache = torch.zeros(len(order), BLOCK_SIZE, *rows[0].shape[1:], device="cuda")
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32, device="cuda")
    for i, row in enumerate(rows):
        for j, part in enumerate(row.split(BLOCK_SIZE)):
            block = order.pop()
            cache[block, : len(part)] = part
            table[i, j] = block
    return cache, table


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("num_queries", [1, 24])
@pytest.mark.parametrize("extra", ["none", "sinks", "soft cap", "fp8", "fp8 and sinks", "fp8 and soft cap"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_log_sum_exp(head_dim: int, extra: str, num_queries: int, num_splits: int) -> None:
    """Of all that is in the softmax's denominator: sinks, capped logits, descaled queries and keys."""
    generator = torch.Generator().manual_seed(1)
    num_heads, num_kv_heads = 8, 2
    dtype = torch.float8_e4m3fn if "fp8" in extra else torch.bfloat16
    counts = [min(n, num_queries) for n in LENGTHS]
    query = (2 * torch.randn(sum(counts), num_heads, head_dim, generator=generator)).cuda().to(dtype)
    keys, values = (
        [torch.randn(n, num_kv_heads, head_dim, generator=generator).cuda().to(dtype).float() for n in LENGTHS]
        for _ in range(2)
    )
    (key_cache, table), (value_cache, _) = paged(keys), paged(values)
    starts = torch.tensor([0, *counts], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    sinks = torch.linspace(-1, 8, num_heads).cuda().bfloat16() if "sinks" in extra else None
    cap = SOFT_CAP if "soft cap" in extra else 0.0
    descale = {"q_descale": 0.5, "k_descale": 2.0, "v_descale": 0.25} if "fp8" in extra else {}
    output = torch.empty(sum(counts), num_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    scale = head_dim**-0.5
    _, lse, *_ = flash_attn_varlen_func(
        q=query, k=key_cache.to(dtype), v=value_cache.to(dtype), out=output, cu_seqlens_q=starts,
        max_seqlen_q=max(counts), seqused_k=lengths, max_seqlen_k=max(LENGTHS), softmax_scale=scale, causal=True,
        block_table=table, softcap=cap, fa_version=get_flash_attn_version(), num_splits=num_splits, s_aux=sinks,
        return_softmax_lse=True,
        **{k: torch.tensor(v, device="cuda").expand(len(LENGTHS), num_kv_heads) for k, v in descale.items()},
    )  # fmt: skip
    assert lse.dtype == torch.float32 and lse.shape == (num_heads, sum(counts)) and lse.stride(1) == 1
    for i, (count, length) in enumerate(zip(counts, LENGTHS, strict=True)):
        own = slice(int(starts[i]), int(starts[i]) + count)
        q = query[own].double() * descale.get("q_descale", 1.0)
        k, v = (t.double().repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (keys[i], values[i]))
        logits = torch.einsum("qhd,thd->hqt", q, k * descale.get("k_descale", 1.0)) * scale
        if cap:
            logits = (logits / cap).tanh() * cap
        behind = torch.arange(length, device="cuda") > torch.arange(length - count, length, device="cuda")[:, None]
        logits = logits.masked_fill(behind, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.double().view(-1, 1, 1).expand(-1, count, 1)], dim=-1)
        torch.testing.assert_close(lse[:, own].double(), logits.logsumexp(-1), rtol=2e-3, atol=5e-3)
        weights = logits.softmax(-1)[..., :length]
        expected = torch.einsum("hqt,thd->qhd", weights, v * descale.get("v_descale", 1.0))
        tolerance = 6e-2 if "fp8" in extra else 1e-2
        torch.testing.assert_close(output[own].double(), expected, rtol=tolerance, atol=tolerance)
