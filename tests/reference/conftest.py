from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def everywhere(one_thread: None) -> None:
    """Every test of the reference runs on one thread."""
