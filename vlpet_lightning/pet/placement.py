"""Where units go: sites of a backbone, and placements of a method at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlpet_lightning.pet.unit import UnitFactory


@dataclass(frozen=True)
class Site:
    """A place in every layer of a stack, as leaf names below the layer.

    Args:
        stack: ``encoder`` or ``decoder``.
        enters: The leaf whose input is ``x``.
        leaves: The linear layer whose output is ``h``; may be the same leaf.
        side: ``output``: as above. ``input``: the unit works on the input of ``leaves``, which is both ``x`` and ``h``.
        also: A second layer with the same input (``side="input"``): keys and values of one attention.
    """

    stack: str
    enters: str
    leaves: str
    side: Literal["output", "input"] = "output"
    also: str | None = None


@dataclass(frozen=True)
class PromptSite:
    """The place in front of a stack's input, once a stack.

    Args:
        stack: ``encoder`` or ``decoder``.
    """

    stack: str


@dataclass
class Placement:
    """Put a unit at some sites, one instance a layer and site.

    Args:
        at: Names of sites, e.g. ``encoder.attn``.
        unit: Makes a unit from the width of its place.
    """

    at: list[str]
    unit: UnitFactory
