"""Whether a text ends with the expected answer, by math-verify."""

from __future__ import annotations

import importlib.metadata

from math_verify import parse, verify

# Raised when grading changes.
GRADE_VERSION = 1
GRADER = f"math-verify {importlib.metadata.version('math-verify')}, v{GRADE_VERSION}"
TIMEOUT = 5  # seconds to parse, and to compare: sympy may never end


def is_correct(text: str, expected: str) -> bool:
    """Whether the answer that `text` comes to (a boxed one, or else its last formula or number) is `expected`.

    math-verify takes boxed answers that stand close together for one set, which is right for "the roots are ..." and
    wrong after a correction; so the last boxed answer alone counts as well.

    expected: LaTeX or a number; what cannot be parsed or compared in time is not correct
    """
    last = text.rfind("\\boxed")
    return _equals(text, expected) or (last > 0 and _equals(text[last:], expected))


def _equals(text: str, expected: str) -> bool:
    gold = parse(f"${expected}$", parsing_timeout=TIMEOUT, raise_on_error=False)
    given = parse(text, parsing_timeout=TIMEOUT, raise_on_error=False)
    return bool(verify(gold, given, timeout_seconds=TIMEOUT, raise_on_error=False))
