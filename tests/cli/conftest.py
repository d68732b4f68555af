"""Commands set vLLM's environment and its log; a test leaves both as they were."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from unittest import mock

import pytest

from kvllm.cli.quiet import CONFIGURED, QUIET


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    if find_spec("vllm"):
        importlib.import_module("vllm.logger")  # while the environment is as it was: other tests read the log
    loggers = [logging.getLogger(name) for name in ("vllm", "vllm.kvllm")]
    before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    with mock.patch.dict(os.environ):
        for name in (*QUIET, *CONFIGURED, "VLLM_ENABLE_V1_MULTIPROCESSING"):
            os.environ.pop(name, None)
        yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:], logger.propagate = handlers, propagate
