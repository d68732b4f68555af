"""The kinds of places where KvLLM touches vLLM. `seam.py` declares them all, tools/check_seam.py checks them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

# The releases that KvLLM was checked with, oldest first; any patch release of one is accepted.
RELEASES = ("0.32", "0.33")


@dataclass(frozen=True)
class Touch:
    """Names of a vLLM module or class that KvLLM depends on.

    owner:     module, or module:Class
    names:     names in it, separated by whitespace. A function that we replace or rely on has its parameters, as
               source text without annotations. An attribute that a function sets on an object is written
               `function.attribute`.
    why:       what KvLLM needs them for
    drop_when: what would make the dependency unnecessary
    releases:  the releases of vLLM that have them, with these parameters
    """

    owner: str
    names: str
    why: str
    drop_when: str
    releases: tuple[str, ...] = RELEASES

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()

    @property
    def module(self) -> str:
        return self.owner.partition(":")[0]

    @property
    def paths(self) -> dict[str, str | None]:
        """Dotted name in the module -> parameters of a function; None if none are given."""
        prefix = f"{self.owner.partition(':')[2]}.".lstrip(".")
        found = re.findall(r"([\w.]+)(\((?:[^()]|\(\))*\))?", self.names)
        return {prefix + name: " ".join(rest[1:-1].split()) if rest else None for name, rest in found}


class Import(Touch):
    """Private modules and names that we import; the checker finds all other imports by itself."""


@dataclass(frozen=True, kw_only=True)
class Override(Touch):
    """Methods of a vLLM class that a subclass of ours replaces.

    ours: module:class of the subclass
    """

    ours: str


class Assignment(Touch):
    """Attributes of vLLM's objects that we replace or set."""


class Addition(Touch):
    """Attributes that we add to vLLM's objects: their classes must not have them."""


class Read(Touch):
    """Members that we read or call: private ones, and public ones of objects whose class the checker cannot infer."""


class Reliance(Touch):
    """Functions that we neither call nor replace, but whose behaviour we rely on: read these first in a new release."""


@dataclass(frozen=True, kw_only=True)
class Patch(Touch):
    """One function or method that we replace.

    wrap: takes the original, returns the replacement
    """

    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def target(self) -> str:
        """module:qualified name"""
        (path,) = self.paths
        return f"{self.module}:{path}"

    def resolve(self) -> tuple[Any, str, Callable[..., Any]]:
        """(owner, attribute, current value) of the target."""
        (path,) = self.paths
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, import_module(self.module))
        return owner, name, inspect.getattr_static(owner, name)

    def apply(self) -> None:
        """Replace the target; a second call changes nothing."""
        owner, name, original = self.resolve()
        if getattr(original, "kvllm_patch", None) == self.target:
            return
        replacement = functools.wraps(original)(self.wrap(original))
        replacement.kvllm_patch = self.target  # type: ignore[attr-defined]
        setattr(owner, name, replacement)
