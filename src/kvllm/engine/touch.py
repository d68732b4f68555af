"""The kinds of places where KvLLM touches vLLM. `seam.py` declares them all, tools/check_seam.py checks them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]

# The releases that KvLLM was checked with, oldest first; any patch release of one is accepted.
RELEASES = ("0.32", "0.33")


@dataclass(frozen=True, kw_only=True)
class Touch:
    """Names of one vLLM module that KvLLM depends on.

    module:    where they are defined, or imported from
    names:     names in it: `Class`, `Class.attribute`, or `function(parameter, other=default)`. A function is given
               with its parameters, as source text without annotations. An attribute that a function sets on an
               object is `function.attribute`.
    why:       what KvLLM needs them for
    drop_when: what would make the dependency unnecessary
    releases:  the releases of vLLM that have them, with these parameters
    """

    module: str
    names: tuple[str, ...]
    why: str
    drop_when: str
    releases: tuple[str, ...] = RELEASES

    kind: ClassVar[str]

    @property
    def paths(self) -> dict[str, str | None]:
        """Name without parameters -> its parameters; None for what is no function."""
        split = [name.partition("(") for name in self.names]
        return {path: rest.removesuffix(")") if bracket else None for path, bracket, rest in split}


@dataclass(frozen=True, kw_only=True)
class Import(Touch):
    """Names that we import."""

    kind = "import"


@dataclass(frozen=True, kw_only=True)
class Override(Touch):
    """Methods of a vLLM class that a subclass of ours replaces.

    ours: module:class of the subclass
    """

    ours: str

    kind = "override"


@dataclass(frozen=True, kw_only=True)
class Assignment(Touch):
    """Attributes of vLLM's objects that we replace or set."""

    kind = "assignment"


@dataclass(frozen=True, kw_only=True)
class Addition(Touch):
    """Attributes that we add to vLLM's classes: vLLM must not have them."""

    kind = "addition"


@dataclass(frozen=True, kw_only=True)
class Read(Touch):
    """Members that we read or call: private ones, and public ones of objects whose class the checker cannot infer."""

    kind = "read"


@dataclass(frozen=True, kw_only=True)
class Reliance(Touch):
    """Functions that we neither call nor replace, but whose behaviour we rely on: a new release is read here first."""

    kind = "reliance"


@dataclass(frozen=True, kw_only=True)
class Patch(Touch):
    """One function or method that we replace.

    wrap: takes the original, returns the replacement
    """

    wrap: Wrapper

    kind = "patch"

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
