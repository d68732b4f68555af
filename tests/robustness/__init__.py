"""Random input and faults. KVLLM_LONG=1 (`make robustness`) runs the long form of each."""

from __future__ import annotations

import os

LONG = os.environ.get("KVLLM_LONG") == "1"


def examples(short: int, long: int) -> int:
    """Number of examples that a test of random input draws."""
    return long if LONG else short
