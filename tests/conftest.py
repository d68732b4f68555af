"""What several test modules need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DEFAULT_MODEL = Path(__file__).parent.parent / ".models" / "smollm2-135m"

# Before anything imports Hugging Face libraries: tests read local folders only.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Bound to a core, an engine stands still while another process has that core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
if not torch.cuda.is_available():
    # The kernels' tests need Triton's interpreter, and Triton decides when it is imported, which vLLM does.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of SmolLM2-135M-Instruct: $KVLLM_TEST_MODEL, or the one that `make test` fetches."""
    folder = Path(os.environ.get("KVLLM_TEST_MODEL", DEFAULT_MODEL))
    if not (folder / "config.json").exists():
        command = f"python -m tools.fetch_model smollm2-135m {DEFAULT_MODEL}"
        pytest.fail(f"no model in {folder}: run `{command}`, or set KVLLM_TEST_MODEL.")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models and windows: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
