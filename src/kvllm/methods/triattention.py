"""TriAttention (arXiv:2604.04921): where the model's average query will look, from statistics taken beforehand."""

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
    """Keep the keys that fit the mean query of each head, averaged over the distances at which it may come.

    Same: each frequency pair of the mean pre-RoPE query against the key as a complex number, at the distances 1, 2,
    4, ... 65536 from now, plus the spread of the queries' length times the key's; each query head normalised to mean 0
    and variance 1 over the candidates; the maximum over the group.
    Differs: each layer keeps its own choice, as each head does (the paper's per_head mode shares one over the layers).
    "Now" is the newest stored query's position. The prompt is protected and the newest tokens are the buffer.
    """

    statistics: str = Field(
        "",
        description="Path of a file with the query statistics of the model that is served, of all of its heads; "
        "`kvllm eval calibrate` writes one. There is no default.",
    )

    def __post_init__(self) -> None:
        if not self.statistics:
            raise UsageError(
                "statistics='': triattention needs the path of a file with the model's query statistics; "
                "`kvllm eval calibrate` writes one."
            )
        if not Path(self.statistics).is_file():
            raise UsageError(f"statistics={self.statistics!r}: no such file; triattention needs it for this model.")
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
        # float64: products with so few rows round differently from batch to batch.
        keys = window.keys.double()
        # The real part of a product with a conjugate is the dot product of the pairs.
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
                f"statistics={self.statistics!r}: taken from a model with {num_layers} layers with {num_heads} heads "
                f"of {2 * pairs}, but this one has {shape.num_layers} with {shape.num_heads} of {shape.head_dim} (on "
                "this rank); take them anew."
            )


def as_complex(vectors: Tensor) -> Tensor:
    """[..., head_dim] with pairs (i, i + head_dim / 2), as RoPE of Llama and Qwen rotates them -> [..., pairs]."""
    return torch.complex(*vectors.float().chunk(2, dim=-1))


def future_rotation(frequencies: Tensor, now: Tensor) -> Tensor:
    """Mean rotation of a query that comes 1, 2, 4, ... 65536 tokens after `now`.

    frequencies: [pairs], float64;  now: [...];  returns [..., pairs], complex
    """
    offsets = 2.0 ** torch.arange(17, dtype=torch.float64, device=frequencies.device)
    ahead = torch.exp(1j * offsets[:, None] * frequencies).mean(dim=0)
    return (torch.exp(1j * now.unsqueeze(-1) * frequencies) * ahead).to(torch.complex64)


def save_statistics(path: str, queries: Tensor, frequencies: Tensor, scale: Tensor | None = None) -> None:
    """Write the statistics of a sample of queries.

    queries:     [num_layers, num_heads, num_samples, head_dim], before RoPE
    frequencies: [head_dim / 2], radians that a token rotates each pair (a Hugging Face rotary embedding's `inv_freq`)
    scale:       [head_dim / 2], factor on each pair that the model's RoPE scaling applies; None = 1
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
    """The tensors of a statistics file; UsageError where it is none."""
    tensors = read_tensors("statistics", path, device)
    for name, shape in FORMAT.items():
        if name not in tensors:
            raise UsageError(f"statistics={path!r}: has no tensor {name!r} {shape}; take the statistics anew.")
    return tensors
