"""Put units into a backbone without touching its code or moving one of its keys.

The leaf linear layer at which a sublayer's output leaves is replaced by a :class:`UnitLinear`, which owns the same
``weight`` and ``bias`` and then applies the unit. Where the sublayer's input enters at another leaf, a forward pre-hook
there (a bound method of the ``UnitLinear``, so that deepcopy and pickle keep the pair together) hands it over for that
one call. Hooks carry, modules compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlpet_lightning.pet.placement import Placement, Site
from vlpet_lightning.pet.unit import Unit


class UnitLinear(nn.Linear):
    """A linear layer followed by a unit, under the linear layer's own keys.

    Args:
        base: The layer to take the place of; its parameters are shared, not copied.
        unit: Applied to the layer's output.
        reads_own_input: True where ``x`` is this layer's own input; otherwise :meth:`receive` must be hooked to the
            leaf where ``x`` enters.
    """

    def __init__(self, base: nn.Linear, unit: Unit, *, reads_own_input: bool) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would allocate and initialise a second weight
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.unit = unit
        self.reads_own_input = reads_own_input
        self._entered: Tensor | None = None

    def receive(self, leaf: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the leaf where ``x`` enters."""
        self._entered = args[0]

    def forward(self, input: Tensor) -> Tensor:
        h = super().forward(input)
        if self.reads_own_input:
            return self.unit(input, h)
        x, self._entered = self._entered, None  # kept no longer than this call
        if x is None:
            raise RuntimeError(
                f"{type(self.unit).__name__} was called before the sublayer's input came by: call the whole layer"
            )
        return self.unit(x, h)


@dataclass(frozen=True)
class Injected:
    """One unit in its place: site name, layer index and the unit."""

    site: str
    layer: int
    unit: Unit


def _replace(layer: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, new)


@dataclass(frozen=True)
class _Planned:
    place: Injected
    layer: nn.Module
    host: UnitLinear


def _plan(layer: nn.Module, index: int, site: Site, name: str, placement: Placement) -> _Planned:
    base = layer.get_submodule(site.leaves)
    if isinstance(base, UnitLinear):
        raise ValueError(
            f"two units at site {name!r}: {type(base.unit).__name__} is already there; place one unit a site"
        )
    if not isinstance(base, nn.Linear):
        raise TypeError(f"site {name!r} leaves at {site.leaves!r}, a {type(base).__name__}: expected nn.Linear")
    unit = placement.unit(base.out_features)
    if base.weight.device.type == "meta":
        unit.to("meta")
    host = UnitLinear(base, unit, reads_own_input=site.enters == site.leaves)
    host.train(base.training)
    return _Planned(Injected(name, index, unit), layer, host)


def check_placements(placements: Iterable[Placement], sites: Mapping[str, Site]) -> None:
    """Check names before anything is changed.

    Raises:
        ValueError: For an unknown site (lists the valid ones), an empty placement, or two units at one site.
    """
    taken: dict[str, int] = {}
    for index, placement in enumerate(placements):
        if not placement.at:
            raise ValueError(f"placement {index} names no site: choose from {', '.join(sorted(sites))}")
        for name in placement.at:
            if name not in sites:
                raise ValueError(f"unknown site {name!r} in placement {index}: choose from {', '.join(sorted(sites))}")
            if name in taken:
                raise ValueError(
                    f"two units at site {name!r}: placements {taken[name]} and {index}; place one unit a site"
                )
            taken[name] = index


def inject(
    stacks: Mapping[str, Sequence[nn.Module]], sites: Mapping[str, Site], placements: Iterable[Placement]
) -> list[Injected]:
    """Put every placement's units into the layers of its sites, in place.

    Args:
        stacks: The layers of each stack, first to last.
        sites: The backbone's table of sites.
        placements: What to put where.

    Returns:
        One entry a unit, in the order of placement, site and layer.

    Raises:
        ValueError: As :func:`check_placements`, or what a unit's own arguments raise.
        TypeError: If a site is no linear layer in this backbone.
    """
    placements = list(placements)
    check_placements(placements, sites)
    plans = [  # everything that can fail does so here, before a layer is changed
        _plan(layer, index, sites[name], name, placement)
        for placement in placements
        for name in placement.at
        for index, layer in enumerate(stacks[sites[name].stack])
    ]
    for plan in plans:
        _replace(plan.layer, sites[plan.place.site].leaves, plan.host)
    for plan in plans:  # after every replacement: the leaf where x enters may have been replaced itself
        if not plan.host.reads_own_input:
            leaf = plan.layer.get_submodule(sites[plan.place.site].enters)
            leaf.register_forward_pre_hook(plan.host.receive)
    return [plan.place for plan in plans]
