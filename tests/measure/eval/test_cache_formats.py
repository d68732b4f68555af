"""vLLM's cache precisions in the reference: TurboQuant is compared with vLLM's own kernels."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import pytest
import torch

from kvllm.errors import UsageError
from kvllm.measure.eval.cache_formats import TURBOQUANT, TurboQuant, cache_formats
from kvllm.reference.formats import Fp8
from tests.reference.models import tiny_config

HEAD_DIM, TOKENS, HEADS, BLOCK = 64, 6, 2, 4


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """vLLM's modules of TurboQuant's kernels, with Triton's interpreter, which vLLM turns off on CPUs."""
    triton = pytest.importorskip("triton")
    import vllm.triton_utils

    monkeypatch.setattr(vllm.triton_utils, "triton", triton)
    monkeypatch.setattr(vllm.triton_utils, "tl", triton.language)
    names = [f"vllm.v1.attention.ops.triton_turboquant_{part}" for part in ("decode", "store")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    decode, store = (importlib.import_module(name) for name in names)
    for name in names:  # what is imported here is forgotten again
        monkeypatch.delitem(sys.modules, name)
    return decode, store


@pytest.mark.parametrize("name", [name for name in TURBOQUANT if name != "turboquant_k8v4"])
def test_turboquant_restores_what_vllms_kernels_store(name, kernels):
    decode, store = kernels
    layer = cache_formats(name, tiny_config("llama", num_hidden_layers=6, head_dim=HEAD_DIM))[2]
    assert isinstance(layer, TurboQuant)
    torch.manual_seed(0)
    keys, values = torch.randn(2, TOKENS, HEADS, HEAD_DIM)
    keys[..., 3] *= 20  # an outlier channel
    config, blocks = layer.config, math.ceil(TOKENS / BLOCK)
    cache = torch.zeros(blocks, BLOCK, HEADS, config.slot_size_aligned, dtype=torch.uint8)
    centroids, rotation = layer.centroids, layer.rotation
    store.triton_turboquant_store(
        keys, values, cache, torch.arange(TOKENS, dtype=torch.int32), rotation, (centroids[:-1] + centroids[1:]) / 2,
        config.key_mse_bits, config.key_packed_size, config.effective_value_quant_bits,
    )  # fmt: skip
    rotated, restored = torch.full((2, 1, HEADS, TOKENS, HEAD_DIM), math.nan, dtype=torch.float16)
    decode._tq_full_dequant_kv[(TOKENS, HEADS)](
        cache, torch.arange(blocks, dtype=torch.int32)[None], centroids, rotated, restored,
        *rotated.stride()[:3], *restored.stride()[:3], *cache.stride()[:3], blocks,
        HEAD_DIM=HEAD_DIM, BLOCK_SIZE=BLOCK, NUM_KV_HEADS=HEADS, MSE_BYTES=config.key_packed_size - 2,
        KPS=config.key_packed_size, VQB=config.value_quant_bits, VAL_DATA_BYTES=config.value_packed_size - 4,
        MSE_BITS=config.mse_bits, KEY_FP8=0, BLOCK_D=HEAD_DIM, NORM_CORRECTION=int(config.norm_correction),
    )  # fmt: skip
    mine, my_values = layer.round_trip(keys, values)
    theirs = (rotated[0].float() @ rotation).transpose(0, 1)
    # vLLM's kernel gives float16 back; a code that falls on the other side of a bound would be off by a whole level.
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(my_values, restored[0].float().transpose(0, 1), rtol=2e-3, atol=2e-3)
    assert (mine - keys).norm() > 0.05 * keys.norm()
    assert layer.token_bytes(HEAD_DIM) == cache.shape[-1]


def test_the_rotation_is_vllms():
    backend = pytest.importorskip("vllm.v1.attention.backends.turboquant_attn")
    layer = cache_formats("turboquant_4bit_nc", tiny_config("llama", num_hidden_layers=6))[2]
    assert isinstance(layer, TurboQuant)
    torch.testing.assert_close(layer.rotation, backend._build_hadamard(16, "cpu"))


def test_fp8_keys_of_turboquant_are_fp8():
    layer = cache_formats("turboquant_k8v4", tiny_config("llama", num_hidden_layers=6))[3]
    assert layer is not None
    keys, values = torch.randn(2, 5, 2, 16)
    restored, rounded = layer.round_trip(keys, values)
    assert torch.equal(restored, Fp8().round_trip(keys, keys)[0])
    steps = (values.amax(-1) - values.amin(-1)) / 15
    assert ((rounded - values).abs().amax(-1) <= 0.51 * steps).all()


def test_which_layers_keep_their_precision():
    config = tiny_config("llama", num_hidden_layers=6)
    assert list(cache_formats("auto", config)) == [None] * 6
    assert all(isinstance(each, Fp8) for each in cache_formats("fp8", config))
    turboquant = cache_formats("turboquant_3bit_nc", config)
    assert [each is None for each in turboquant] == [True, True, False, False, True, True]


def test_what_is_not_simulated_is_refused_by_name(monkeypatch):
    with pytest.raises(UsageError, match="cache precision 'int4': not supported; use one of auto, fp8"):
        cache_formats("int4", tiny_config("llama"))
    with pytest.raises(UsageError, match="needs a head_dim that is a power of two, not 24"):
        cache_formats("turboquant_4bit_nc", tiny_config("llama", head_dim=24))
