"""Simulate the KV cache formats of vLLM's `--kv-cache-dtype` in the reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from scipy.linalg import hadamard
from torch import Tensor

from kvllm.errors import UsageError
from kvllm.reference.formats import CacheFormat, Fp8

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

AUTO = "auto"  # the model's own dtype
FP8 = "fp8"
TURBOQUANT = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
CACHE_DTYPES = (AUTO, FP8, *TURBOQUANT)


class TurboQuant:
    """TurboQuant as vLLM stores it, with vLLM's own sizes and centroids (arXiv:2504.19874, without its residual).

    Keys: divided by their norm, rotated by a Hadamard matrix, each coordinate replaced by the nearest centroid of a
    normal distribution. Values: quantised uniformly between the minimum and maximum of each token. `exact_prefill`,
    since vLLM computes the attention of a prefill before it quantises the keys and values.
    """

    exact_prefill: ClassVar[bool] = True

    def __init__(self, config: TurboQuantConfig) -> None:
        self.config = config

    @functools.cached_property
    def centroids(self) -> Tensor:
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids

        return get_centroids(self.config.head_dim, self.config.centroid_bits).sort().values

    @functools.cached_property
    def rotation(self) -> Tensor:
        size = self.config.head_dim
        return torch.from_numpy(hadamard(size) / size**0.5).float()

    def token_bytes(self, head_dim: int) -> float:
        return self.config.slot_size_aligned

    def round_trip(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.key_fp8:
            restored, _ = Fp8().round_trip(keys, keys)
        else:
            restored = self._keys(keys.float()).to(keys.dtype)
        return restored, self._values(values.float()).to(values.dtype)

    def _keys(self, keys: Tensor) -> Tensor:
        centroids, rotation = self.centroids.to(keys.device), self.rotation.to(keys.device)
        norms = keys.norm(dim=-1, keepdim=True)
        rotated = keys / (norms + 1e-8) @ rotation
        found = centroids[torch.bucketize(rotated, (centroids[:-1] + centroids[1:]) / 2, right=True)]
        if self.config.norm_correction:
            found = found * (found.square().sum(-1, keepdim=True) + 1e-16).rsqrt()
        return found @ rotation * norms.half().float()  # the rotation is its own inverse

    def _values(self, values: Tensor) -> Tensor:
        levels = 2**self.config.value_quant_bits - 1
        lowest, highest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        scale = ((highest - lowest) / levels).clamp(min=1e-8)
        codes = ((values - lowest) / scale + 0.5).floor().clamp(0, levels)
        return codes * scale.half().float() + lowest.half().float()


def cache_formats(name: str, config: Any) -> Sequence[CacheFormat | None]:
    """The format of each layer; None: the model's own dtype.

    config: a transformers config
    Raises UsageError for unsupported names, and for TurboQuant without vLLM or with an unsupported head_dim.
    """
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    if name == AUTO:
        return [None] * num_layers
    if name == FP8:
        return [Fp8()] * num_layers
    if name not in TURBOQUANT:
        raise UsageError(f"cache precision {name!r}: not supported; use one of {', '.join(CACHE_DTYPES)}.")
    if find_spec("vllm") is None:
        raise UsageError(f"cache precision {name!r}: uses vLLM's quantiser; install vLLM, or leave this precision out.")
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim & (head_dim - 1):
        raise UsageError(
            f"cache precision {name!r}: its rotation needs a head_dim that is a power of two, not {head_dim}."
        )
    quantised = TurboQuant(TurboQuantConfig.from_cache_dtype(name, head_dim))
    # vLLM does not quantise the first and last layers.
    plain = TurboQuantConfig.get_boundary_skip_layers(SimpleNamespace(is_hybrid=False, hf_text_config=text))
    return [None if str(i) in plain else quantised for i in range(num_layers)]
