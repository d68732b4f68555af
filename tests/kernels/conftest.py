"""Kernels run on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported, so this must come before anything that imports it, such as vLLM.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Triton was imported without its interpreter, so the kernels cannot run on the CPU: "
            "run `pytest tests/kernels` on its own, or set TRITON_INTERPRET=1."
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
