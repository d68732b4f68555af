"""What several test modules need."""

from __future__ import annotations

import functools
import os
import re
import runpy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server import Server, kvllm_serve

ROOT = Path(__file__).parent.parent
ENGINE_GUARD = Path(__file__).parent / "engine_guard"
DEFAULT_MODEL = Path(__file__).parent.parent / ".models" / "smollm2-135m"

# Before anything imports Hugging Face libraries: tests read local folders only.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Bound to a core, an engine stands still while another process has that core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
if not torch.cuda.is_available():
    # The kernels' tests need Triton's interpreter, and Triton decides when it is imported, which vLLM does.
    os.environ["TRITON_INTERPRET"] = "1"
# `-m "not engine"` starts no engine: here and in all processes that tests start, one in an unmarked test is refused.
UNMARKED_TEST = runpy.run_path(str(ENGINE_GUARD / "sitecustomize.py"))["UNMARKED_TEST"]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ENGINE_GUARD), os.environ.get("PYTHONPATH")]))


class GroupResources:
    """What the tests of one `xdist_group` share, across their modules: engines and servers, slow to start.

    Tests of a group run one after the other in one process; what is held ends with the last of them.
    """

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}
        self._stack = ExitStack()

    def get(self, name: str, make: Callable[[], AbstractContextManager[Any]]) -> Any:
        if name not in self._held:
            self._held[name] = self._stack.enter_context(make())
        return self._held[name]

    def close(self) -> None:
        self._held.clear()
        self._stack.close()


group_resources = GroupResources()


@functools.cache
def group_of_module(path: str) -> str:
    """The `xdist_group` that a module of tests names; without one the module, path from the root, is a group."""
    named = re.search(r'xdist_group\("([^"]+)"\)', (ROOT / path).read_text())
    return path if named is None else named[1]


def group_of(item: pytest.Item) -> str:
    return group_of_module(item.nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups stay in one worker. (xdist 3.8's own groups do nothing under pytest 9.2: each test is sent alone.)"""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of_module(nodeid.partition("::")[0])

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {group: i for i, group in reversed([*enumerate(map(group_of, items))])}
    # Those that start engines first: groups of a few seconds are left to fill the workers at the end.
    slow = {group_of(item) for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: (group_of(item) not in slow, order[group_of(item)]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("engine"):
        os.environ.pop(UNMARKED_TEST, None)
    else:
        os.environ[UNMARKED_TEST] = item.nodeid


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or group_of(nextitem) != group_of(item):
        group_resources.close()


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of SmolLM2-135M-Instruct: $KVLLM_TEST_MODEL, or the one that `make test` fetches."""
    folder = Path(os.environ.get("KVLLM_TEST_MODEL", DEFAULT_MODEL))
    if not (folder / "config.json").exists():
        command = f"python -m tools.fetch_model smollm2-135m {DEFAULT_MODEL}"
        pytest.fail(f"no model in {folder}: run `{command}`, or set KVLLM_TEST_MODEL.")
    return folder


@pytest.fixture
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The server of the xdist_group "server"."""
    return group_resources.get("server", lambda: kvllm_serve(model_dir, tmp_path_factory.mktemp("server") / "log"))


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are known in it only: the documentation lists all that are registered."""
    import kvllm.methods

    kvllm.methods.methods()  # all of the package's own
    monkeypatch.setattr(kvllm.methods, "_REGISTRY", dict(kvllm.methods._REGISTRY))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models and windows: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
