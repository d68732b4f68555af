"""Methods on top of a base method: they take its scores and select in their own way."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any

from kvllm.methods import methods
from kvllm.methods.base import Method
from kvllm.methods.rope import Rope


class OnBase(Method):
    """A method with the fields `base` and `base_options`, which name the method that scores."""

    base: str
    base_options: Mapping[str, Any]

    @cached_property
    def scorer(self) -> Method:
        return base_method(self.base, self.base_options)

    @property
    def uses_rope(self) -> bool:
        return self.scorer.uses_rope

    def check_rope(self, rope: Rope | None) -> None:
        if self.scorer.uses_rope:
            self.scorer.check_rope(rope)


def base_method(base: str, base_options: Mapping[str, Any]) -> Method:
    """The method named `base` with its options; ValueError names what is wrong with them."""
    known = methods()
    if base not in known:
        close = difflib.get_close_matches(str(base), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"methods are {', '.join(known)}."
        raise ValueError(f"base={base!r}: no method has this name; {hint}")
    if not isinstance(base_options, Mapping):
        raise ValueError(f"base_options={base_options!r}: must be a mapping of {base}'s own options.")
    names = [f.name for f in fields(known[base])]  # type: ignore[arg-type]
    for key in base_options:
        if key not in names:
            raise ValueError(
                f"base_options={dict(base_options)}: {base} has no option {key!r}; "
                f"its options are {', '.join(names) or 'none'}."
            )
    return known[base](**base_options)
