"""Registry of the compression methods. Every module in this package is imported, so a new method is one new file."""

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

# KvConfig options that are passed to any method with a field of the same name.
SHARED_OPTIONS = ("max_chunk_size", "seed")


def register(name: str) -> Callable[[M], M]:
    """Class decorator that registers a method as `name`."""

    def add(cls: M) -> M:
        if _REGISTRY.setdefault(name, cls) is not cls:
            raise ValueError(f"two methods are named {name!r}: {_REGISTRY[name]} and {cls}")
        return cls

    return add


def methods() -> dict[str, type[Method]]:
    """All registered methods, sorted by name."""
    _import_modules()
    return dict(sorted(_REGISTRY.items()))


@functools.cache  # a server calls methods() for every request that it validates
def _import_modules() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def checked_config(options: Mapping[str, Any]) -> KvConfig:
    """`KvConfig.from_dict` that also validates the methods' names and options; for all front ends."""
    config = KvConfig.from_dict(options)
    make_methods(config)
    return config


def make_method(config: KvConfig) -> Method:
    """Build the method that `config` names, with its options. Raises UsageError for an unknown or invalid option."""
    cls = method_class("method", config.method)
    return build(cls, config.method, "method_options", {**_shared_options(config, cls), **config.method_options})


def make_methods(config: KvConfig) -> dict[str, Method]:
    """The engine's own method, and those of `request_methods`, by name and in the order of `KvConfig.methods`.

    Raises UsageError for an unknown or invalid option.
    """
    made = {config.method: make_method(config)}
    for name, options in config.request_method_options.items():
        cls = method_class("request_methods", name)
        made[name] = build(cls, name, "request_methods", {**_shared_options(config, cls), **options})
    return made


def _shared_options(config: KvConfig, cls: type[Method]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SHARED_OPTIONS if name in options_of(cls)}


def with_budgets(config: KvConfig, layers: Sequence[int]) -> KvConfig:
    """`config` with one ratio per group of layers, if its method sets layer budgets itself (`pyramidkv`).

    layers: numbers of the model's full-attention layers
    Raises UsageError if the method cannot divide these layers into groups, or if requests may choose another one.
    """
    if config.budgets or not config.enabled:
        return config
    budgets = {name: made.layer_budgets(config.mean_ratio, layers) for name, made in make_methods(config).items()}
    if config.request_methods and (setting := [name for name in budgets if budgets[name]]):
        raise UsageError(
            f"request_methods={config.request_methods!r}: cannot be combined with {setting[0]}, because it gives "
            "groups of layers ratios of their own, and an engine has the same groups for all requests. Leave "
            f"{setting[0]} out, or serve it as the only method."
        )
    own = budgets[config.method]
    return replace(config, retention_ratio=table_of(own)) if own else config


def method_class(option: str, name: str) -> type[Method]:
    """The class registered as `name`. Raises UsageError, citing `option`, if there is none."""
    known = methods()
    if name not in known:
        raise UsageError(f"{option}={name!r}: {no_such('method', name, known)}")
    return known[name]


def build(cls: type[Method], name: str, option: str, options: Mapping[str, Any]) -> Method:
    """Instantiate a method with the options that the user passed as `option`. Raises UsageError if they are invalid."""
    with within(f"{option} of {name}"):
        return cls(**options)


def resolved(config: KvConfig) -> dict[str, Any]:
    """The configuration with all method options, defaults included, as recorded with measurements."""
    options = all_options(make_method(config))
    return {**config.to_dict(), "method_options": {k: v for k, v in options.items() if k not in SHARED_OPTIONS}}


def all_options(method: Method) -> dict[str, Any]:
    """A method's options and values, including those of its base method, if it has one."""
    options = {name: getattr(method, name) for name in options_of(type(method))}
    scorer = getattr(method, "scorer", None)
    return options if scorer is None else options | {"base_options": all_options(scorer)}
