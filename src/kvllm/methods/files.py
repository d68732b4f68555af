"""Read the tensor files that method options name."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvllm.errors import UsageError


def read_tensors(option: str, path: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UsageError, citing `option`, if it is not one."""
    try:
        return load_file(path, device=str(device))
    except SafetensorError as e:
        raise UsageError(f"{option}={path!r}: not a safetensors file ({e}).") from e
