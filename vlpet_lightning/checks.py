"""Checks of constructor arguments; each returns the value or raises a ValueError that names it."""

from __future__ import annotations

import math


def positive(name: str, value: int) -> int:
    """Return ``value``.

    Raises:
        ValueError: If it is below 1.
    """
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def within(name: str, value: float, least: float, most: float = math.inf) -> float:
    """Return ``value``.

    Raises:
        ValueError: If it is not between ``least`` and ``most``.
    """
    if not least <= value <= most:  # nor is NaN
        wanted = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value


def above_zero(name: str, value: float) -> float:
    """Return ``value``.

    Raises:
        ValueError: If it is 0, negative or infinite.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be more than 0, and finite, got {value}")
    return value


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``.

    Raises:
        ValueError: If it is not among ``choices``.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value
