"""Grade answers with math-verify."""

from __future__ import annotations

import importlib.metadata

from math_verify import parse, verify

# Incremented when grading changes.
GRADE_VERSION = 1
GRADER = f"math-verify {importlib.metadata.version('math-verify')}, v{GRADE_VERSION}"
TIMEOUT = 5  # seconds, for parsing and for comparing: sympy may not terminate


def is_correct(text: str, expected: str) -> bool:
    """Whether the final answer of `text` (a boxed one, else its last formula or number) equals `expected`.

    math-verify reads adjacent boxed answers as one set, which is right for "the roots are ..." but wrong after a
    correction; so a text is also correct if its last boxed answer alone is.

    expected: LaTeX or a number. Answers that cannot be parsed or compared within TIMEOUT count as wrong
    """
    last = text.rfind("\\boxed")
    return _equals(text, expected) or (last > 0 and _equals(text[last:], expected))


def _equals(text: str, expected: str) -> bool:
    gold = parse(f"${expected}$", parsing_timeout=TIMEOUT, raise_on_error=False)
    given = parse(text, parsing_timeout=TIMEOUT, raise_on_error=False)
    return bool(verify(gold, given, timeout_seconds=TIMEOUT, raise_on_error=False))
