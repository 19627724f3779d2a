"""Checks of constructor arguments; each returns the value or raises a ValueError that names it."""

from __future__ import annotations

import math


def positive(name: str, value: int) -> int:
    """Return ``value`` if it is at least 1.

    Raises:
        ValueError: If it is below 1.
    """
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def within(name: str, value: float, least: float, most: float = math.inf) -> float:
    """Return ``value`` if it lies between ``least`` and ``most``.

    Raises:
        ValueError: If it does not.
    """
    if not least <= value <= most:  # true for NaN as well
        wanted = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value


def above_zero(name: str, value: float) -> float:
    """Return ``value`` if it is positive and finite.

    Raises:
        ValueError: If it is 0, negative or infinite.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be more than 0, and finite, got {value}")
    return value


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value
