"""Parameter counts as in the published tables, and reports of units and trainable rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.table import Table
from torch import nn

from vlpet_lightning.display import Displayed
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import SideNetwork, Unit

GROUPS = (
    "visual embedding",
    "vision PET",
    "vision gates",
    "projector PET",
    "projector gates",
    "encoder PET",
    "encoder gates",
    "decoder PET",
    "decoder gates",
    "side network PET",
    "side network gates",
    "shared by all units",
    "PEFT",
    "encoder norms",
    "decoder norms",
    "biases",
    "rest of the backbone",
)
STACKS = ("vision", "projector", "encoder", "decoder")  # whose units may share modules


@dataclass(frozen=True)
class Count:
    """Total and trained number of parameters of a group."""

    total: int
    trainable: int


class ModelHolder(Protocol):
    """A LightningModule, as far as the reports read it."""

    def built(self) -> VLModel: ...


@dataclass(frozen=True, repr=False)
class ParameterReport(Displayed):
    """Parameter counts of a model; printed as a table.

    Args:
        total: Number of all parameters, including added modules and counting tied tensors once.
        trainable: Number of trained parameters.
        percent: ``100 * trainable / total``, the formula of the original (src/trainer_base.py:
            print_trainable_params_percentage) and of the paper's tables.
        percent_of_backbone: Trained parameters in percent of the pretrained language model's parameters.
        groups: Counts by group, with keys from :data:`GROUPS`; empty groups are omitted.
    """

    total: int
    trainable: int
    percent: float
    percent_of_backbone: float
    groups: dict[str, Count]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, for JSON and loggers."""
        return asdict(self)

    def table(self) -> Table:
        """Return the report as a table for the terminal."""
        table = Table(title=f"{self.trainable:,} of {self.total:,} parameters are trained: {self.percent:.2f} %")
        table.add_column("group")
        for heading in ("trainable", "total", "% of all"):
            table.add_column(heading, justify="right")
        for name, count in self.groups.items():
            share = f"{100 * count.trainable / self.total:.2f}" if count.trainable else ""
            table.add_row(name, f"{count.trainable:,}", f"{count.total:,}", share)
        table.add_section()
        table.add_row("sum", f"{self.trainable:,}", f"{self.total:,}", f"{self.percent:.2f}")
        table.caption = f"{self.percent_of_backbone:.2f} % of the bare backbone"
        return table

    def tables(self) -> list[Table]:
        return [self.table()]


def _group_of_each(model: VLModel) -> dict[int, str]:
    visual = model.backbone.visual_parameters(model.lm, model.visual)
    found: dict[int, str] = {id(p): "visual embedding" for p in visual.values()}
    for name, module in model.shared.items():
        owner = next((stack for stack in STACKS if name.endswith(stack)), None)
        found |= {id(p): "shared by all units" if owner is None else f"{owner} PET" for p in module.parameters()}
    for place in model.injected:
        stack = model.backbone.sites[place.site].stack
        gates = {id(p) for p in place.unit.gate_parameters()}
        for parameter in place.unit.parameters():
            found[id(parameter)] = f"{stack} gates" if id(parameter) in gates else f"{stack} PET"
    parameters = dict(model.lm.named_parameters())
    found |= {id(parameters[name]): "PEFT" for name in model.inserted.state if name in parameters}
    for stack in ("encoder", "decoder"):
        for norm in model.backbone.norms(model.lm, stack).values():
            for parameter in norm.parameters():
                found[id(parameter)] = f"{stack} norms"
    return found


def _model(model: VLModel | ModelHolder) -> VLModel:
    return model if isinstance(model, VLModel) else model.built()


def count_parameters(model: VLModel | ModelHolder) -> ParameterReport:
    """Count the parameters of a model, or of the module that holds it, by group; works on the meta device.

    >>> import vlpet_lightning as vl
    >>> from vlpet_lightning.pet import LoRA, Placement
    >>> units = Placement(["encoder.attn.query", "encoder.attn.value"], LoRA.with_(rank=8))
    >>> report = vl.count_parameters(vl.build("facebook/bart-base", units, ["pet"], device="meta"))
    >>> report.trainable == 2 * 6 * (8 * 768 + 768 * 8)
    True
    >>> f"{report.trainable:,} parameters, {report.percent:.2f} %"
    '147,456 parameters, 0.10 %'
    """
    model = _model(model)
    group = _group_of_each(model)
    total = dict.fromkeys(GROUPS, 0)
    trainable = dict.fromkeys(GROUPS, 0)
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())  # tied tensors once
    for name, parameter in parameters.items():
        rest = "biases" if "bias" in name else "rest of the backbone"
        key = group.get(id(parameter), rest)
        total[key] += parameter.numel()
        trainable[key] += parameter.numel() if parameter.requires_grad else 0
    everything, trained = sum(total.values()), sum(trainable.values())
    return ParameterReport(
        total=everything,
        trainable=trained,
        percent=100 * trained / everything,
        percent_of_backbone=100 * trained / model.backbone_parameters,
        groups={name: Count(total[name], trainable[name]) for name in GROUPS if total[name]},
    )


@dataclass(frozen=True)
class SiteRow:
    """One kind of unit at a site.

    Args:
        site: Name of the site; empty for modules shared by the units of all sites. For parameters that another
            library inserted into the language model, their name without the layer index.
        unit: One-line summary of the unit: class, settings and parts. For inserted parameters, their shape.
        layers: Indices of the layers that have the unit.
        parameters: Total number of parameters over these layers.
    """

    site: str
    unit: str
    layers: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class RuleRow:
    """Matches of a ``trainable`` rule; rules may overlap.

    Args:
        rule: Name of the rule.
        tensors: Number of matched tensors.
        parameters: Total number of elements of these tensors.
    """

    rule: str
    tensors: int
    parameters: int


@dataclass(frozen=True, repr=False)
class PlacementReport(Displayed):
    """The units of a model by site, and the matches of its ``trainable`` rules; printed as tables.

    Args:
        sites: One row per site and kind of unit, in the order of the placements, followed by shared modules.
        free_sites: Sites of the backbone without a unit.
        rules: One row per rule.
    """

    sites: tuple[SiteRow, ...]
    free_sites: tuple[str, ...]
    rules: tuple[RuleRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """Return the report as tables for the terminal."""
        units = Table(title="units", caption=f"free sites: {', '.join(self.free_sites)}")
        for heading in ("site", "unit", "layers"):
            units.add_column(heading, overflow="fold")
        units.add_column("parameters", justify="right")
        for row in self.sites:
            units.add_row(row.site or "shared", row.unit, _ranges(row.layers), f"{row.parameters:,}")
        rules = Table(title="trainable")
        rules.add_column("rule")
        for heading in ("tensors", "parameters"):
            rules.add_column(heading, justify="right")
        for rule in self.rules:
            rules.add_row(rule.rule, f"{rule.tensors:,}", f"{rule.parameters:,}")
        return [units, rules] if self.sites else [rules]


def placement_report(model: VLModel | ModelHolder) -> PlacementReport:
    """Report the units of a model by site, and the matches of its rules; works on the meta device.

    >>> import vlpet_lightning as vl
    >>> from vlpet_lightning.pet import LoRA, Placement
    >>> units = Placement(["encoder.attn.query"], LoRA.with_(rank=8))
    >>> report = vl.placement_report(vl.build("facebook/bart-base", units, ["pet"], device="meta"))
    >>> [(row.site, row.layers, row.parameters) for row in report.sites]
    [('encoder.attn.query', (0, 1, 2, 3, 4, 5), 73728)]
    >>> report.rules
    (RuleRow(rule='pet', tensors=12, parameters=73728),)
    """
    model = _model(model)
    at: dict[tuple[str, str], list[tuple[int, Unit]]] = {}
    for place in model.injected:
        at.setdefault((place.site, unit_summary(place.unit)), []).append((place.layer, place.unit))
    sites = [
        SiteRow(site, said, tuple(layer for layer, _ in units), _elements(nn.ModuleList(unit for _, unit in units)))
        for (site, said), units in at.items()
    ]
    sites += [SiteRow("", f"{name}: {unit_summary(m)}", (), _elements(m)) for name, m in model.shared.items()]
    parameters = dict(model.named_parameters())
    sites += _inserted(model, parameters)
    rules = [
        RuleRow(rule, len(names), sum(parameters[name].numel() for name in names))
        for rule, names in model.trainable.items()
    ]
    closed = {site for site, _ in at} | set(model.backbone.refused_sites)
    return PlacementReport(tuple(sites), tuple(s for s in model.backbone.sites if s not in closed), tuple(rules))


def _inserted(model: VLModel, parameters: dict[str, nn.Parameter]) -> list[SiteRow]:
    """Return rows for the parameters that another library inserted into the language model."""
    found: dict[tuple[str, str], list[int]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for name in model.inserted.trained:
        parameter = parameters[f"lm.{name}"]
        index = re.search(r"(?<=\.)\d+(?=\.)", name)  # the layer index is the first number in the name
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1), "x".join(map(str, parameter.shape)))
        found.setdefault(key, []).extend([int(index[0])] if index else [])
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    return [SiteRow(site, shape, tuple(layers), sizes[site, shape]) for (site, shape), layers in found.items()]


def unit_summary(module: nn.Module) -> str:
    """Summarise a module in one line: class, ``extra_repr`` and parts.

    >>> unit_summary(nn.Sequential(nn.Linear(4, 2), nn.Tanh()))
    'Sequential(0 4->2, 1 Tanh)'
    """
    if isinstance(module, nn.Linear):
        return f"{module.in_features}->{module.out_features}"
    if isinstance(module, nn.Embedding):
        return f"{module.num_embeddings}x{module.embedding_dim}"
    # a ParameterDict's extra_repr prints its parameters on several lines
    said = [] if isinstance(module, nn.ParameterDict) else [module.extra_repr()]
    if isinstance(module, Unit) and module.positions != "all":
        said.append(f"positions={module.positions}")
    if isinstance(module, SideNetwork):  # its parts follow from its settings and the backbone
        return f"{type(module).__name__}({said[0]})"
    alike: dict[str, list[str]] = {}
    for name, part in module.named_children():
        alike.setdefault(unit_summary(part), []).append(name)
    for name, parameter in module.named_parameters(recurse=False):
        alike.setdefault("x".join(map(str, parameter.shape)), []).append(name)
    said += [f"{' '.join(names)} {part}" for part, names in alike.items()]
    inside = ", ".join(part for part in said if part)
    return f"{type(module).__name__}({inside})" if inside else type(module).__name__


def _said(line: str) -> tuple[str, list[str]]:
    """Split the output of :func:`unit_summary` into the class and its top-level parts."""
    kind, _, inside = line.partition("(")
    parts, depth = [""], 0
    for sign in inside.removesuffix(")"):
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return kind, [part.strip() for part in parts]


def difference(there: str, here: str) -> str:
    """Describe the difference between two summaries from :func:`unit_summary`, one from a file and ours.

    >>> difference("LargeGate(scale=1.0, down 8->4, up 4->8)", "LargeGate(scale=1.0, down 8->2, up 2->8)")
    'LargeGate with down 8->4, up 4->8 there, with down 8->2, up 2->8 here'
    >>> difference("LargeGate(scale=1.0, down 8->4, up 4->8)", "SmallGate(scale=1.0, score 16->1)")
    'LargeGate there, SmallGate here'
    """
    (kind, theirs), (other, ours) = _said(there), _said(here)
    if kind != other:
        return f"{kind} there, {other} here"
    more = ", ".join(part for part in theirs if part not in ours)
    mine = ", ".join(part for part in ours if part not in theirs)
    return f"{kind} with {more or 'nothing'} there, with {mine or 'nothing'} here"


def unit_differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Describe the differences between the units of a file and of a model, grouped over sites.

    Args:
        theirs: Unit summaries of the file, by site.
        ours: Unit summaries of the model, by site.
    """
    places: dict[tuple[str, str], list[str]] = {}
    for site in sorted(set(theirs) | set(ours)):
        pair = theirs.get(site, "nothing"), ours.get(site, "nothing")
        if pair[0] != pair[1]:
            places.setdefault(pair, []).append(site)
    return [f"{', '.join(sites)}: {difference(there, here)}" for (there, here), sites in places.items()]


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _ranges(indices: tuple[int, ...]) -> str:
    """Format indices as ranges: ``(0, 1, 2, 5)`` as ``0-2 5``."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
