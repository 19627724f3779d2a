"""Insert units into a backbone without changing its code or its state dict keys.

The linear layer that produces a sublayer's output is replaced by a :class:`UnitLinear`, which owns the same ``weight``
and ``bias`` and then applies the unit. If the sublayer's input enters at a different leaf module, a forward pre-hook
on that leaf passes the input to the ``UnitLinear`` for the current call. The hook is a bound method of the
``UnitLinear``, so deepcopy and pickle preserve the connection. Hooks only pass tensors; all computation is in modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlpet_lightning.pet.placement import AnySite, Placement, SideSite, Site, check_offered
from vlpet_lightning.pet.side_network import Host, SideNetwork
from vlpet_lightning.pet.unit import Place, Unit


class UnitLinear(nn.Linear):
    """Linear layer with a unit on its output, its input, or both; the linear layer's state dict keys do not change.

    Args:
        base: Layer to replace; its parameters are shared, not copied.

    Attributes:
        unit: Unit applied to the layer's output.
        input_unit: Unit applied to the layer's input.
        reads_own_input: Whether the unit's ``x`` is this layer's own input. If not, :meth:`receive` must be registered
            as a forward pre-hook on the leaf where ``x`` enters.
        enabled: Whether the units are applied; if False, the layer is a plain linear layer.
    """

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's constructor would allocate and initialise a second weight
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.unit: Unit | None = None
        self.input_unit: Unit | None = None
        self.reads_own_input = True
        self.enabled = True
        self._entered: Tensor | None = None
        self.train(base.training)

    @property
    def units(self) -> list[Unit]:
        """The units at this layer."""
        return [unit for unit in (self.input_unit, self.unit) if unit is not None]

    def receive(self, leaf: nn.Module, args: tuple[Any, ...]) -> None:
        """Store ``x`` for the next call; a forward pre-hook for the leaf where ``x`` enters."""
        self._entered = args[0]

    def forward(self, input: Tensor) -> Tensor:
        entered, self._entered = self._entered, None  # release the tensor after this call
        if not self.enabled:
            return super().forward(input)
        if self.input_unit is not None:
            input = self.input_unit.act(input, input)
        h = super().forward(input)
        if self.unit is None:
            return h
        x = input if self.reads_own_input else entered
        if x is None:
            raise RuntimeError(
                f"{type(self.unit).__name__} was called before the sublayer's input was seen: call the whole layer"
            )
        return self.unit.act(x, h)


@dataclass(frozen=True)
class Injected:
    """An inserted unit with its site name and layer index."""

    site: str
    layer: int
    unit: Unit


@dataclass(frozen=True)
class _Planned:
    place: Injected
    layer: nn.Module
    site: Site


def widths_of(layer: nn.Module, site: Site, name: str) -> tuple[int, int]:
    """Return the numbers of channels of ``x`` and ``h`` at a site.

    Raises:
        TypeError: If the site is not a linear layer in this backbone.
    """
    base = layer.get_submodule(site.leaves)
    if not isinstance(base, nn.Linear):
        raise TypeError(f"site {name!r} leaves at {site.leaves!r}, a {type(base).__name__}: expected nn.Linear")
    if site.side == "input":
        return base.in_features, base.in_features
    enters: Any = layer.get_submodule(site.enters)  # a linear layer, or a norm
    return enters.weight.shape[-1], base.out_features


def _check_free(layer: nn.Module, site: Site, name: str) -> None:
    base = layer.get_submodule(site.leaves)
    there = (base.unit if site.side == "output" else base.input_unit) if isinstance(base, UnitLinear) else None
    if there is not None:
        raise ValueError(f"two units at site {name!r}: {type(there).__name__} is already there; place one unit a site")


def make_unit(placement: Placement, width: int, like: Tensor, leaving: int | None = None, name: str = "") -> Unit:
    """Create a placement's unit, on the meta device if ``like`` is on it.

    Args:
        placement: The placement.
        width: Number of channels of ``x``.
        like: A tensor of the model.
        leaving: Number of channels of ``h``, for a unit inside a layer.
        name: Name of the site.

    Raises:
        ValueError: If the widths differ and the unit needs equal ones, or the unit does not act inside layers.
    """
    unit = placement.unit(width)
    if leaving is not None:
        _check_kind(unit, name)
    if leaving not in (None, width):
        try:
            unit.map_to(leaving)
        except ValueError as error:
            raise ValueError(
                f"site {name!r} has {width} channels where x enters and {leaving} where h leaves: {error}"
            ) from error
    return unit.to("meta") if like.device.type == "meta" else unit


def _plan(layer: nn.Module, index: int, site: Site, name: str, placement: Placement) -> _Planned:
    width, leaving = widths_of(layer, site, name)
    _check_free(layer, site, name)
    base: Any = layer.get_submodule(site.leaves)
    unit = make_unit(placement, width, base.weight, leaving, name)
    if _readers(unit) and (site.side != "output" or site.enters != site.leaves):
        raise ValueError(
            f"{type(unit).__name__} at site {name!r} computes with the weight of one linear layer: place it where x "
            "enters and h leaves at the same layer, such as a query projection"
        )
    if site.positions and placement.positions == "all":
        _check_alone(
            unit,
            name,
            "which here include later tokens of the answer: limit its placement to positions: prefix or image",
        )
    if site.flat:
        _check_alone(unit, name, "which here include other images of the batch: use a unit without it there")
    unit.limit_to(placement.positions)
    return _Planned(Injected(name, index, unit), layer, site)


def _check_kind(unit: Unit, name: str) -> None:
    if isinstance(unit, SideNetwork):
        raise ValueError(
            f"{type(unit).__name__} at site {name!r} runs beside the whole backbone, not in a layer: place it at side"
        )
    if unit.adds_tokens:
        raise ValueError(
            f"{type(unit).__name__} at site {name!r} adds tokens, which has no meaning inside a layer: place it at "
            "encoder.prompt or decoder.prompt"
        )


def _check_alone(unit: Unit, name: str, reason: str) -> None:
    for part in unit.modules():
        if getattr(part, "reads_other_positions", False):
            raise ValueError(
                f"{type(part).__name__} at site {name!r} computes a position from other positions, {reason}"
            )


def _readers(unit: Unit) -> list[Unit]:
    return [part for part in unit.modules() if isinstance(part, Unit) and part.needs_linear]


def check_placements(
    placements: Iterable[Placement], sites: Mapping[str, AnySite], refused: Mapping[str, str] | None = None
) -> None:
    """Check the site names of all placements before the backbone is changed.

    Args:
        placements: The placements.
        sites: The backbone's table of sites.
        refused: Reasons why other known sites cannot be used, with the cure.

    Raises:
        ValueError: For an unknown site (the message lists the valid ones) or a refused one, a placement without sites,
            two units at one site, units beside a side network, or positions at a site that has no choice of them.
    """
    taken: dict[str, int] = {}
    for index, placement in enumerate(placements):
        if not placement.at:
            raise ValueError(f"placement {index} names no site: choose from {', '.join(sorted(sites))}")
        for name in placement.at:
            check_offered(name, refused or {})
            if name not in sites:
                raise ValueError(f"unknown site {name!r} in placement {index}: choose from {', '.join(sorted(sites))}")
            if name in taken:
                raise ValueError(
                    f"two units at site {name!r}: placements {taken[name]} and {index}; place one unit a site"
                )
            taken[name] = index
            if placement.positions != "all" and not getattr(sites[name], "positions", False):
                raise ValueError(
                    f"positions is {placement.positions!r} in placement {index}, but units at site {name!r} act at all "
                    "positions: omit it, or choose a site inside the layers of a decoder-only model"
                )
    inside = sorted(name for name in taken if not isinstance(sites[name], SideSite))
    if inside and len(inside) < len(taken):
        raise ValueError(
            f"a side network, and units inside the backbone at {', '.join(inside)}: nothing is back-propagated through "
            "the backbone of a side network, so those units could not be trained; remove them, or the side network"
        )


def _host(layer: nn.Module, path: str) -> UnitLinear:
    """Return the leaf as a :class:`UnitLinear`, replacing the plain linear layer if necessary."""
    base = layer.get_submodule(path)
    if isinstance(base, UnitLinear):
        return base
    host = UnitLinear(base)  # type: ignore[arg-type]
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, host)
    return host


def _attach(plan: _Planned) -> None:
    host = _host(plan.layer, plan.site.leaves)
    if plan.site.side == "output":
        host.unit = plan.place.unit
        host.reads_own_input = plan.site.enters == plan.site.leaves
        for part in _readers(plan.place.unit):
            part.bind(host)
        return
    host.input_unit = plan.place.unit
    if plan.site.also is not None:
        _host(plan.layer, plan.site.also).input_unit = plan.place.unit


def inject(
    stacks: Mapping[str, Sequence[nn.Module]],
    sites: Mapping[str, AnySite],
    placements: Iterable[Placement],
    shared: nn.ModuleDict | None = None,
) -> list[Injected]:
    """Insert the units of all placements into the layers, in place; prompt sites are handled by the model.

    Args:
        stacks: The layers of each stack, first to last.
        sites: The backbone's table of sites.
        placements: Units and their sites.
        shared: Modules shared between units, by name; units may add to it.

    Returns:
        One entry per unit, ordered by placement, site and layer.

    Raises:
        ValueError: As in :func:`check_placements`, or if a unit rejects its arguments.
        TypeError: If a site is not a linear layer in this backbone.
    """
    placements = list(placements)
    check_placements(placements, sites)
    common = nn.ModuleDict() if shared is None else shared
    layered = [
        (placement, name, site)
        for placement in placements
        for name in placement.at
        if isinstance(site := sites[name], Site)
    ]
    plans = [  # all checks happen here, before any layer is changed
        _plan(layer, index, site, name, placement)
        for placement, name, site in layered
        for index, layer in enumerate(stacks[site.stack])
    ]
    for plan in plans:
        place = Place(plan.place.site, plan.site.stack, plan.place.layer, len(stacks[plan.site.stack]))
        plan.place.unit.join(place, common)
    for plan in plans:
        _attach(plan)
    for plan in plans:  # after all replacements, because the leaf where x enters may have been replaced too
        host: Any = plan.layer.get_submodule(plan.site.leaves)
        if plan.site.side == "output" and plan.site.enters != plan.site.leaves:
            plan.layer.get_submodule(plan.site.enters).register_forward_pre_hook(host.receive)
    return [plan.place for plan in plans]


def build_side_networks(
    backbone: Host, lm: Any, sites: Mapping[str, AnySite], placements: Sequence[Placement]
) -> list[tuple[str, SideNetwork]]:
    """Build the side network of a model.

    Args:
        backbone: Description of the language model's architecture.
        lm: Language model.
        sites: The backbone's table of sites.
        placements: Units and their sites; others than side networks are ignored.

    Returns:
        Site and network, at most one.

    Raises:
        ValueError: If another unit is placed at the site of a side network, or the settings do not fit the backbone.
    """
    width = backbone.token_embedding(lm)
    built = []
    for placement in placements:
        for name in placement.at:
            if isinstance(sites[name], SideSite):
                unit = placement.unit(width.shape[1])
                if not isinstance(unit, SideNetwork):
                    raise ValueError(
                        f"{type(unit).__name__} at site {name!r} is no side network: place a LadderSideNetwork there"
                    )
                unit.build(backbone, lm)
                built.append((name, unit.to("meta") if width.device.type == "meta" else unit))
    return built
