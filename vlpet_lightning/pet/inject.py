"""Inject units into a backbone without changing its code or moving any of its state-dict keys.

The linear layer that outputs a sublayer's result is replaced by a :class:`UnitLinear`, which owns the same ``weight``
and ``bias`` and then applies the unit. If the sublayer's input enters at another leaf, a forward pre-hook on that leaf
passes it on for that call only. The hook is a bound method of the ``UnitLinear``, so that deepcopy and pickle keep the
pair together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlpet_lightning.pet.placement import Placement, PromptSite, Site
from vlpet_lightning.pet.unit import Place, Unit


class UnitLinear(nn.Linear):
    """A linear layer with a unit on its output, its input or both, under the same keys.

    Args:
        base: The layer to replace; its parameters are shared, not copied.

    Attributes:
        unit: Applied to the layer's output.
        input_unit: Applied to the layer's input.
        reads_own_input: Whether the unit's ``x`` is this layer's own input. If not, :meth:`receive` must be hooked to
            the leaf where ``x`` enters.
        enabled: If False, the layer acts as the plain linear layer.
    """

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would allocate and initialise a second weight
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

    def receive(self, leaf: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the leaf where ``x`` enters."""
        self._entered = args[0]

    def forward(self, input: Tensor) -> Tensor:
        entered, self._entered = self._entered, None  # held for this call only
        if not self.enabled:
            return super().forward(input)
        if self.input_unit is not None:
            input = self.input_unit(input, input)
        h = super().forward(input)
        if self.unit is None:
            return h
        x = input if self.reads_own_input else entered
        if x is None:
            raise RuntimeError(
                f"{type(self.unit).__name__} was called before the sublayer's input was seen: call the whole layer"
            )
        return self.unit(x, h)


@dataclass(frozen=True)
class Injected:
    """An injected unit with its site name and layer index."""

    site: str
    layer: int
    unit: Unit


@dataclass(frozen=True)
class _Planned:
    place: Injected
    layer: nn.Module
    site: Site


def width_of(layer: nn.Module, site: Site, name: str) -> int:
    """Return the feature dimension at a site.

    Raises:
        TypeError: If the site is not a linear layer in this backbone.
        ValueError: If ``x`` and ``h`` differ in width.
    """
    base = layer.get_submodule(site.leaves)
    if not isinstance(base, nn.Linear):
        raise TypeError(f"site {name!r} leaves at {site.leaves!r}, a {type(base).__name__}: expected nn.Linear")
    if site.side == "input":
        return base.in_features
    enters: Any = layer.get_submodule(site.enters)  # a linear layer, or a norm
    width = enters.weight.shape[-1]
    if width != base.out_features:
        raise ValueError(
            f"site {name!r} has {width} channels where x enters and {base.out_features} where h leaves: units need "
            "equal widths"
        )
    return base.out_features


def _check_free(layer: nn.Module, site: Site, name: str) -> None:
    base = layer.get_submodule(site.leaves)
    there = (base.unit if site.side == "output" else base.input_unit) if isinstance(base, UnitLinear) else None
    if there is not None:
        raise ValueError(f"two units at site {name!r}: {type(there).__name__} is already there; place one unit a site")


def make_unit(placement: Placement, width: int, like: Tensor) -> Unit:
    """Build a placement's unit; on the meta device if ``like`` is."""
    unit = placement.unit(width)
    return unit.to("meta") if like.device.type == "meta" else unit


def _plan(layer: nn.Module, index: int, site: Site, name: str, placement: Placement) -> _Planned:
    width = width_of(layer, site, name)
    _check_free(layer, site, name)
    base: Any = layer.get_submodule(site.leaves)
    unit = make_unit(placement, width, base.weight)
    if unit.adds_tokens:
        raise ValueError(
            f"{type(unit).__name__} at site {name!r} adds tokens, which has no meaning inside a layer: place it at "
            "encoder.prompt or decoder.prompt"
        )
    if _readers(unit) and (site.side != "output" or site.enters != site.leaves):
        raise ValueError(
            f"{type(unit).__name__} at site {name!r} computes with the weight of one linear layer: place it where x "
            "enters and h leaves at the same layer, e.g. encoder.attn.query"
        )
    return _Planned(Injected(name, index, unit), layer, site)


def _readers(unit: Unit) -> list[Unit]:
    return [part for part in unit.modules() if isinstance(part, Unit) and part.needs_linear]


def check_placements(placements: Iterable[Placement], sites: Mapping[str, Site | PromptSite]) -> None:
    """Check the names of sites before anything is changed.

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


def _host(layer: nn.Module, path: str) -> UnitLinear:
    """Return the leaf as a :class:`UnitLinear`, replacing it if it is not one yet."""
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
    sites: Mapping[str, Site | PromptSite],
    placements: Iterable[Placement],
    shared: nn.ModuleDict | None = None,
) -> list[Injected]:
    """Inject every placement's units into the layers of its sites, in place. The model handles prompt sites itself.

    Args:
        stacks: The layers of each stack, first to last.
        sites: The backbone's table of sites.
        placements: Units and their sites.
        shared: Modules shared between units, by name; units may add to it.

    Returns:
        One entry per unit, in the order of placement, site and layer.

    Raises:
        ValueError: As :func:`check_placements`, or from a unit's constructor.
        TypeError: If a site is no linear layer in this backbone.
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
    plans = [  # everything that can fail does so here, before any layer is changed
        _plan(layer, index, site, name, placement)
        for placement, name, site in layered
        for index, layer in enumerate(stacks[site.stack])
    ]
    for plan in plans:
        place = Place(plan.place.site, plan.site.stack, plan.place.layer, len(stacks[plan.site.stack]))
        plan.place.unit.join(place, common)
    for plan in plans:
        _attach(plan)
    for plan in plans:  # after all replacements, since the leaf where x enters may have been replaced as well
        host: Any = plan.layer.get_submodule(plan.site.leaves)
        if plan.site.side == "output" and plan.site.enters != plan.site.leaves:
            plan.layer.get_submodule(plan.site.enters).register_forward_pre_hook(host.receive)
    return [plan.place for plan in plans]
