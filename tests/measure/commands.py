"""Calling `kvllm eval` and `kvllm bench` in this process."""

from __future__ import annotations

from kvllm.__main__ import app


def kvllm(*arguments: str) -> None:
    """Run the command; its UsageErrors are raised."""
    app(list(arguments), standalone_mode=False)
