"""vLLM makes its process groups once in a process, and leaves out those of experts where the model has none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def process_groups_of_this_module() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
