"""Check for the optional dependencies of measurements: kvllm-measure brings them, a checkout may lack them."""

from __future__ import annotations

from importlib.util import find_spec

from kvllm.cli.measuring import INSTALL
from kvllm.errors import UsageError


def require(*modules: str) -> None:
    """Raise UsageError, saying what to install, unless all of the modules can be imported."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UsageError(f"this needs {', '.join(missing)}, which is not installed; install: {INSTALL}.")
