"""The methods, by name. Adding one is adding a file here and its test: every module of this package is imported."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from kvllm.budgets import table_of
from kvllm.config import KvConfig
from kvllm.errors import UsageError, within
from kvllm.options import no_such, options_of

if TYPE_CHECKING:
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


def checked_config(options: Mapping[str, Any]) -> KvConfig:
    """`KvConfig.from_dict`, and the method's name and options checked too: what front ends read options with."""
    config = KvConfig.from_dict(options)
    make_method(config)
    return config


def make_method(config: KvConfig) -> Method:
    """The method that `config` asks for, with its options; UsageError names what is wrong with them."""
    cls = method_class("method", config.method)
    shared = {name: getattr(config, name) for name in SHARED_OPTIONS if name in options_of(cls)}
    return build(cls, config.method, "method_options", {**shared, **config.method_options})


def with_budgets(config: KvConfig, layers: Sequence[int]) -> KvConfig:
    """`config` with the table of ratios that its method makes of one ratio for all layers, if it does (`pyramidkv`).

    layers: the numbers of the model's layers of full attention
    Raises UsageError where the method cannot divide these layers into groups.
    """
    if config.budgets or not config.enabled:
        return config
    made = make_method(config).layer_budgets(config.mean_ratio, layers)
    return replace(config, retention_ratio=table_of(made)) if made else config


def method_class(option: str, name: str) -> type[Method]:
    """The method of this name; UsageError, naming the option that holds the name, where there is none."""
    known = methods()
    if name not in known:
        raise UsageError(f"{option}={name!r}: {no_such('method', name, known)}")
    return known[name]


def build(cls: type[Method], name: str, option: str, options: Mapping[str, Any]) -> Method:
    """The method with these options, which the user gave as `option`; UsageError names what is wrong with them."""
    with within(f"{option} of {name}"):
        return cls(**options)


def resolved(config: KvConfig) -> dict[str, Any]:
    """The configuration with every option of its method, defaults too: what a measurement has to record."""
    options = all_options(make_method(config))
    return {**config.to_dict(), "method_options": {k: v for k, v in options.items() if k not in SHARED_OPTIONS}}


def all_options(method: Method) -> dict[str, Any]:
    """A method's options and their values; of one on a base, the base's own too."""
    options = {name: getattr(method, name) for name in options_of(type(method))}
    scorer = getattr(method, "scorer", None)
    return options if scorer is None else options | {"base_options": all_options(scorer)}
