"""Sites of a backbone, and placements of units at these sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlpet_lightning.pet.unit import UnitFactory


@dataclass(frozen=True)
class Site:
    """A position in every layer of a stack, given by the names of leaf modules below the layer.

    Args:
        stack: ``encoder`` or ``decoder``.
        enters: The leaf whose input is ``x``.
        leaves: The linear layer whose output is ``h``; may be the same leaf.
        side: ``output``: as above. ``input``: the unit acts on the input of ``leaves``, which is both ``x`` and ``h``.
        also: A second layer with the same input (``side="input"``): keys and values of one attention.
    """

    stack: str
    enters: str
    leaves: str
    side: Literal["output", "input"] = "output"
    also: str | None = None


@dataclass(frozen=True)
class PromptSite:
    """The position before a stack's input, once per stack.

    Args:
        stack: ``encoder`` or ``decoder``.
    """

    stack: str


@dataclass
class Placement:
    """A unit at some sites, with one instance per layer and site.

    Args:
        at: Names of sites, e.g. ``encoder.attn``.
        unit: Factory that builds a unit from the feature dimension at its site.
    """

    at: list[str]
    unit: UnitFactory
