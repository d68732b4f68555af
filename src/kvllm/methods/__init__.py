"""The methods, by name. Adding one is adding a file here and its test: every module of this package is imported."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from kvllm.config import KvConfig
    from kvllm.methods.base import Method

_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")

# Options of KvConfig that a method takes by having a field of the same name.
SHARED_OPTIONS = ("max_chunk_size", "seed")


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known under `name`."""

    def add(cls: M) -> M:
        if _REGISTRY.setdefault(name, cls) is not cls:
            raise ValueError(f"two methods are named {name!r}: {_REGISTRY[name]} and {cls}")
        return cls

    return add


def methods() -> dict[str, type[Method]]:
    """Every method by name, sorted."""
    _import_modules()
    return dict(sorted(_REGISTRY.items()))


@functools.cache  # a server builds a configuration for each request that it checks
def _import_modules() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def make_method(config: KvConfig) -> Method:
    """The method that `config` asks for, with its options; ValueError names what is wrong with them."""
    known = methods()
    cls = known.get(config.method)
    if cls is None:
        close = difflib.get_close_matches(config.method, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"methods are {', '.join(known)}."
        raise ValueError(f"no method named {config.method!r}; {hint}")
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in config.method_options:
        if key not in names:
            raise ValueError(
                f"method_options={dict(config.method_options)}: {config.method} has no option {key!r}; "
                f"its options are {', '.join(names) or 'none'}."
            )
    shared = {name: getattr(config, name) for name in SHARED_OPTIONS if name in names}
    return cls(**(shared | dict(config.method_options)))


def resolved(config: KvConfig) -> dict[str, Any]:
    """The configuration with every option of its method, defaults too: what a measurement has to record."""
    options = all_options(make_method(config))
    return {**config.to_dict(), "method_options": {k: v for k, v in options.items() if k not in SHARED_OPTIONS}}


def all_options(method: Method) -> dict[str, Any]:
    """A method's fields; of one on a base, the base's own too."""
    options = {f.name: getattr(method, f.name) for f in fields(method)}  # type: ignore[arg-type]
    scorer = getattr(method, "scorer", None)
    return options if scorer is None else options | {"base_options": all_options(scorer)}


def check_method(config: KvConfig) -> None:
    """Raise ValueError unless `make_method` can build what `config` asks for."""
    make_method(config)
