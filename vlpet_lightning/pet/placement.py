"""Sites of a backbone, and placements of units at those sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from vlpet_lightning.pet.unit import UnitFactory


@dataclass(frozen=True)
class Site:
    """A location in every layer of a stack, given by module names relative to the layer.

    Args:
        stack: ``encoder`` or ``decoder``.
        enters: Name of the leaf module whose input is ``x``.
        leaves: Name of the linear layer whose output is ``h``; may equal ``enters``.
        side: ``output`` is as above. With ``input``, the unit is applied to the input of ``leaves``, which is both
            ``x`` and ``h``.
        also: Name of a second layer with the same input (``side="input"``), e.g. for keys and values of one attention.
    """

    stack: str
    enters: str
    leaves: str
    side: Literal["output", "input"] = "output"
    also: str | None = None


@dataclass(frozen=True)
class PromptSite:
    """The location in front of a stack's input, one per stack.

    Args:
        stack: ``encoder`` or ``decoder``.
    """

    stack: str


@dataclass(frozen=True)
class SideSite:
    """The location of a side network beside the backbone, one per model."""

    stack: ClassVar[str] = "side network"


AnySite = Site | PromptSite | SideSite


@dataclass
class Placement:
    """A unit and the sites where it is placed, with one instance per layer and site.

    >>> from vlpet_lightning.pet import VLPET, LargeGate, Placement
    >>> placement = Placement(["encoder.attn", "encoder.ffn"], VLPET.with_(rank=8, gate=LargeGate.with_(rank=8)))
    >>> placement.unit(32).gate.down
    Linear(in_features=32, out_features=8, bias=True)
    >>> Placement("encoder.ffn", VLPET).at
    ['encoder.ffn']

    Args:
        at: Names of sites, e.g. ``encoder.attn``; in Python, also the name of one site.
        unit: Factory of the unit, called with the width of the site: a class, or a class with some settings
            (:meth:`Unit.with_ <vlpet_lightning.pet.unit.Configurable.with_>`, ``functools.partial``).

    Raises:
        TypeError: If ``unit`` is a module instead of a factory.
    """

    at: list[str]
    unit: UnitFactory

    def __post_init__(self) -> None:
        if isinstance(self.at, str):
            self.at = [self.at]
        if isinstance(self.unit, nn.Module):
            kind = type(self.unit).__name__
            raise TypeError(
                f"the unit of a placement is built anew for every layer, got one {kind}: give the class with its "
                f"settings, {kind}.with_(...)"
            )
