"""Sites of a backbone, and placements of units at those sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from vlpet_lightning.checks import choice
from vlpet_lightning.pet.unit import Positions, UnitFactory


@dataclass(frozen=True)
class Site:
    """A location in every layer of a stack, given by module names relative to the layer.

    Args:
        stack: ``encoder``, ``decoder``, or ``vision`` or ``projector`` of a decoder-only model.
        enters: Name of the leaf module whose input is ``x``.
        leaves: Name of the linear layer whose output is ``h``; may equal ``enters``.
        side: ``output`` is as above. With ``input``, the unit is applied to the input of ``leaves``, which is both
            ``x`` and ``h``.
        also: Name of a second layer with the same input (``side="input"``), e.g. for keys and values of one attention.
        positions: Whether units may be limited to some positions of the sequence.
        flat: Whether ``x`` is ``(n, d)``, the vectors of all images of a batch in one sequence.
    """

    stack: str
    enters: str
    leaves: str
    side: Literal["output", "input"] = "output"
    also: str | None = None
    positions: bool = False
    flat: bool = False


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
        positions: Positions of a decoder-only model's sequence at which the unit acts: ``prefix`` are those before the
            answer, ``image`` those of image tokens.

    Raises:
        TypeError: If ``unit`` is a module instead of a factory.
        ValueError: If ``positions`` is unknown.
    """

    at: list[str]
    unit: UnitFactory
    positions: Positions = "all"

    def __post_init__(self) -> None:
        choice("positions", self.positions, get_args(Positions))
        if isinstance(self.at, str):
            self.at = [self.at]
        if isinstance(self.unit, nn.Module):
            kind = type(self.unit).__name__
            raise TypeError(
                f"the unit of a placement is built anew for every layer, got one {kind}: give the class with its "
                f"settings, {kind}.with_(...)"
            )


def check_offered(name: str, refused: Mapping[str, str]) -> None:
    """Check that a known site is not refused.

    Args:
        name: Name of the site.
        refused: Reasons and cures, by site.

    Raises:
        ValueError: If it is refused.
    """
    if name in refused:
        raise ValueError(f"site {name!r} cannot be used: {refused[name]}")


def check_linear_sites(
    at: Sequence[str], sites: Mapping[str, AnySite], refused: Mapping[str, str] | None = None
) -> None:
    """Check that methods of another library, which wrap single linear layers, can be placed at some sites.

    Args:
        at: Names of sites.
        sites: The backbone's table of sites.
        refused: As in :func:`check_offered`.

    Raises:
        ValueError: If a site is unknown or refused, or is not a single linear layer.
    """
    single = [name for name, site in sites.items() if isinstance(site, Site) and site.enters == site.leaves]
    single = [name for name in single if getattr(sites[name], "also", None) is None]
    for name in at:
        check_offered(name, refused or {})
        if name not in single:
            reason = "is not a single linear layer, which peft needs" if name in sites else "does not exist"
            raise ValueError(f"peft: site {name!r} {reason}; choose from {', '.join(single)}")


def linear_layers_at(
    lm: nn.Module, stacks: Mapping[str, Sequence[nn.Module]], sites: Mapping[str, AnySite], at: Sequence[str]
) -> list[str]:
    """Return the names of the linear layers at some sites, in the order of the sites and layers.

    Raises:
        ValueError: As in :func:`check_linear_sites`.
    """
    check_linear_sites(at, sites)
    names = {id(module): name for name, module in lm.named_modules()}
    return [
        names[id(layer.get_submodule(site.leaves))]
        for site in (sites[name] for name in at)
        if isinstance(site, Site)
        for layer in stacks[site.stack]
    ]
