"""Refuse vLLM engines in tests that are not marked `engine`; Python runs this module when a process starts.

The folder is in the PYTHONPATH of every process that a test starts, and `tests/conftest.py` runs the module in its own.
"""

import functools
import importlib.machinery
import os
import sys

UNMARKED_TEST = "KVLLM_UNMARKED_TEST"  # the id of the running test, if it is not marked
ENGINE = "vllm.v1.engine.core"  # every engine is an EngineCore, in whatever process


class _Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name != ENGINE or (spec := importlib.machinery.PathFinder.find_spec(name, path)) is None:
            return None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _guard(module.EngineCore)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _guard(engine_class):
    original = engine_class.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        if test := os.environ.get(UNMARKED_TEST):
            raise RuntimeError(f"{test} starts a vLLM engine: mark it with @pytest.mark.engine.")
        original(self, *args, **kwargs)

    engine_class.__init__ = init


sys.meta_path.insert(0, _Finder())
