"""Check for the optional dependencies of measurements."""

from __future__ import annotations

from importlib.util import find_spec

from kvllm.errors import UsageError


def require(extra: str, *modules: str) -> None:
    """Raise UsageError, naming the extra to install, unless all of the modules can be imported."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UsageError(
            f"this needs {', '.join(missing)}, which is not installed; in the checkout: uv pip install '.[{extra}]'."
        )
