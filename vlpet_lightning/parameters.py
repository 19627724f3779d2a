"""Counting parameters the way the published tables do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import nn

from vlpet_lightning.model import VLModel

GROUPS = (
    "visual embedding",
    "encoder PET",
    "encoder gates",
    "decoder PET",
    "decoder gates",
    "shared by all units",
    "encoder norms",
    "decoder norms",
    "biases",
    "rest of the backbone",
)


@dataclass(frozen=True)
class Count:
    """Parameters of a group: all of them, and those that are trained."""

    total: int
    trainable: int


@dataclass(frozen=True)
class ParameterReport:
    """Parameters of a model.

    Args:
        total: All parameters, added modules included, tied tensors once.
        trainable: Those that are trained.
        percent: ``100 * trainable / total``: the original's formula (src/trainer_base.py:
            print_trainable_params_percentage), and the one of the paper's tables.
        percent_of_backbone: Trainable parameters in percent of the pretrained language model's own.
        groups: By the names of :data:`GROUPS`, empty ones left out.
    """

    total: int
    trainable: int
    percent: float
    percent_of_backbone: float
    groups: dict[str, Count]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON and loggers."""
        return asdict(self)

    def table(self) -> Table:
        """A table for a terminal."""
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


def _group_of_each(model: VLModel) -> dict[int, str]:
    found: dict[int, str] = {id(p): "visual embedding" for p in model.visual.parameters()}
    for name, module in model.shared.items():
        owner = next((stack for stack in ("encoder", "decoder") if name.endswith(stack)), None)
        found |= {id(p): "shared by all units" if owner is None else f"{owner} PET" for p in module.parameters()}
    for place in model.injected:
        stack = model.backbone.sites[place.site].stack
        gates = {id(p) for p in place.unit.gate_parameters()}
        for parameter in place.unit.parameters():
            found[id(parameter)] = f"{stack} gates" if id(parameter) in gates else f"{stack} PET"
    for stack in ("encoder", "decoder"):
        for norm in model.backbone.norms(model.lm, stack).values():
            for parameter in norm.parameters():
                found[id(parameter)] = f"{stack} norms"
    return found


def count_parameters(model: VLModel) -> ParameterReport:
    """Count by group; works on the meta device."""
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
