"""Checks of a method's options: each refusal names the option, its value and what is accepted."""

from __future__ import annotations


def check_count(name: str, value: object, lowest: int = 1) -> None:
    """Raise ValueError unless `value` is an int of at least `lowest`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name}={value!r}: must be a whole number, {lowest} or more.")


def check_kernel(name: str, value: object) -> None:
    """Raise ValueError unless `value` is an odd width of pooling."""
    check_count(name, value)
    if value % 2 == 0:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}: must be odd, so that the pooling is centred; 1 = none.")


def check_between(name: str, value: object, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: must be a number from {low} to {high}.")


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a bool: the text "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be true or false.")


def check_rope_theta(value: object) -> None:
    """Raise ValueError unless `value` is None or the base of a rotary embedding."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 1):
        raise ValueError(f"rope_theta={value!r}: must be the model's own, as in its config.json (such as 10000.0).")
