"""`-m "not engine"` starts no engine: a test without the marker cannot start one, in whatever process."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = "from vllm.v1.engine.core import EngineCore; EngineCore(None, None, False)"
REFUSED = "starts a vLLM engine: mark it with @pytest.mark.engine."


def test_an_unmarked_test_cannot_start_an_engine() -> None:
    from vllm.v1.engine.core import EngineCore

    with pytest.raises(RuntimeError, match=f"test_an_unmarked_test_cannot_start_an_engine.* {REFUSED}"):
        EngineCore(None, None, False)  # type: ignore[arg-type]


def test_a_process_of_an_unmarked_test_cannot_start_an_engine() -> None:
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert done.returncode == 1 and REFUSED in done.stderr


@pytest.mark.engine
def test_a_marked_test_can_start_an_engine() -> None:
    from vllm.v1.engine.core import EngineCore

    with pytest.raises(AttributeError, match="NoneType"):  # from vLLM, which gets no config
        EngineCore(None, None, False)  # type: ignore[arg-type]
