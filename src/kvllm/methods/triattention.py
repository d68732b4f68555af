"""TriAttention (arXiv:2604.04921): expected attention of the model's mean query, from calibrated statistics."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from kvllm.errors import UsageError
from kvllm.methods import register
from kvllm.methods.attention import text_positions
from kvllm.methods.base import LayerShape, Method, Window
from kvllm.methods.files import read_tensors
from kvllm.options import strict_dataclass

FORMAT = {  # tensors of a statistics file and their shapes
    "mean_real": "[num_layers, num_heads, head_dim / 2]",
    "mean_imag": "[num_layers, num_heads, head_dim / 2]",
    "mean_norm": "[num_layers, num_heads, head_dim / 2]",
    "frequencies": "[head_dim / 2]",
    "scale": "[head_dim / 2]",
}


@register("triattention")
@strict_dataclass
class TriAttention(Method):
    """Keep the keys with the largest dot product with each head's mean query, averaged over future distances.

    Same: the mean pre-RoPE query times the key, per frequency pair as complex numbers, at distances 1, 2, 4, ... 65536
    from now, plus the excess of the queries' mean norm over the norm of their mean, times the key's norm; scores of
    each query head are normalised to mean 0 and variance 1 over the candidates; then the maximum over the group.
    Differs: each layer selects on its own (the paper's per_head mode shares a selection between layers). "Now" is the
    position of the newest stored query. The prompt is protected and the newest tokens are in the buffer.
    """

    statistics: str = Field(
        "",
        description="Path of a file with query statistics for all heads of the served model; required. "
        "`kvllm eval calibrate` writes one.",
    )

    def __post_init__(self) -> None:
        if not self.statistics:
            raise UsageError(
                "statistics='': required; give the path of a file with the model's query statistics, which "
                "`kvllm eval calibrate` writes."
            )
        if not Path(self.statistics).is_file():
            raise UsageError(f"statistics={self.statistics!r}: no such file; `kvllm eval calibrate` writes one.")
        load_statistics(self.statistics, torch.device("cpu"))

    @property
    def counts_positions(self) -> bool:
        return True

    def score(self, window: Window) -> Tensor:
        statistics = load_statistics(self.statistics, window.keys.device)
        # [batch, num_kv_heads, group_size, pairs], with the heads of each KV head together
        mean_real, mean_imag, mean_norm = (
            statistics[name][window.layers].unflatten(1, (window.num_kv_heads, -1))
            for name in ("mean_real", "mean_imag", "mean_norm")
        )
        mean = torch.complex(mean_real, mean_imag)
        weight = statistics["scale"] ** 2
        now = text_positions(window).amax(dim=(-2, -1))  # [batch, num_kv_heads]
        expected = mean * future_rotation(statistics["frequencies"], now).unsqueeze(2) * weight
        expected = torch.cat([expected.real, expected.imag], dim=-1)  # [batch, num_kv_heads, group_size, head_dim]
        # float64: in float32, the rounding of products with so few rows would depend on the batch size.
        keys = window.keys.double()
        # The dot product of pairs is the real part of one complex number times the other's conjugate.
        direction = torch.einsum("bhgd,bthd->bhgt", expected.double(), keys)
        excess = (mean_norm - mean.abs()) * weight
        spread = torch.einsum("bhgf,bthf->bhgt", excess.double(), torch.hypot(*keys.chunk(2, dim=-1)))
        scores = direction + spread
        scores = scores - scores.mean(dim=-1, keepdim=True)
        scores = scores / scores.std(dim=-1, keepdim=True, correction=0).clamp(min=1e-12)
        return scores.amax(dim=2).float()

    def check_layers(self, shape: LayerShape) -> None:
        statistics = load_statistics(self.statistics, torch.device("cpu"))
        num_layers, num_heads, pairs = statistics["mean_real"].shape
        if (num_heads, 2 * pairs) != (shape.num_heads, shape.head_dim) or num_layers < shape.num_layers:
            raise UsageError(
                f"statistics={self.statistics!r}: made for a model with {num_layers} layers, {num_heads} heads and "
                f"head_dim {2 * pairs}, but this one has {shape.num_layers} layers, {shape.num_heads} heads (on this "
                f"rank) and head_dim {shape.head_dim}; run `kvllm eval calibrate` for this model."
            )


def as_complex(vectors: Tensor) -> Tensor:
    """[..., head_dim] as complex pairs (i, i + head_dim / 2), which RoPE of Llama and Qwen rotates; [..., pairs]."""
    return torch.complex(*vectors.float().chunk(2, dim=-1))


def future_rotation(frequencies: Tensor, now: Tensor) -> Tensor:
    """Mean rotation of queries 1, 2, 4, ... 65536 tokens after `now`.

    frequencies: [pairs], float64;  now: [...];  returns [..., pairs], complex
    """
    offsets = 2.0 ** torch.arange(17, dtype=torch.float64, device=frequencies.device)
    ahead = torch.exp(1j * offsets[:, None] * frequencies).mean(dim=0)
    return (torch.exp(1j * now.unsqueeze(-1) * frequencies) * ahead).to(torch.complex64)


def save_statistics(path: str, queries: Tensor, frequencies: Tensor, scale: Tensor | None = None) -> None:
    """Write the statistics of a sample of queries.

    queries:     [num_layers, num_heads, num_samples, head_dim], before RoPE
    frequencies: [head_dim / 2], radians per token of each pair (`inv_freq` in Hugging Face's rotary embeddings)
    scale:       [head_dim / 2], factor that the model's RoPE scaling applies to each pair; None: 1
    """
    pairs = as_complex(queries)
    mean = pairs.to(torch.complex128).mean(dim=2)
    tensors = {
        "mean_real": mean.real.float().contiguous(),
        "mean_imag": mean.imag.float().contiguous(),
        "mean_norm": pairs.abs().double().mean(dim=2).float(),
        "frequencies": frequencies.double(),
        "scale": torch.ones(len(frequencies)) if scale is None else scale.float(),
    }
    save_file(tensors, path)


@lru_cache(maxsize=8)
def load_statistics(path: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a statistics file. Raises UsageError if the file is not valid."""
    tensors = read_tensors("statistics", path, device)
    for name, shape in FORMAT.items():
        if name not in tensors:
            raise UsageError(f"statistics={path!r}: has no tensor {name!r} {shape}; run `kvllm eval calibrate` again.")
    return tensors
