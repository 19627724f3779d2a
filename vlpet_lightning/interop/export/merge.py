"""Merging of units into their linear layers, for units that can be merged exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlpet_lightning.interop.export.model_card import HERE, in_words
from vlpet_lightning.interop.export.pet_files import save_pet
from vlpet_lightning.interop.export.record import write_record
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import count_parameters
from vlpet_lightning.pet import IA3, Injected, PerTask, Site, Unit, UnitLinear


def _hosts(model: VLModel, place: Injected) -> list[tuple[str, UnitLinear]]:
    """Return the linear layers that hold a unit, by name relative to the stack's layer."""
    site = model.backbone.sites[place.site]
    if not isinstance(site, Site):
        raise ValueError(f"{type(place.unit).__name__} cannot be merged: {place.unit.unmergeable}")
    layer = model.backbone.site_layers(model.lm)[site.stack][place.layer]
    names = [site.leaves] if site.also is None else [site.leaves, site.also]
    return [(name, layer.get_submodule(name)) for name in names]  # type: ignore[misc]


def _unit(place: Injected, task: str | None) -> Unit:
    unit = place.unit
    if not isinstance(unit, PerTask) or task is None:
        return unit
    if task not in unit.units:
        raise ValueError(f"no unit for task {task!r} to merge: there are {', '.join(unit.units)}")
    return unit.units[task]  # type: ignore[return-value]


def _check_reach(unit: Unit, host: UnitLinear, place: Injected) -> None:
    if host.unit is place.unit and not host.reads_own_input and not isinstance(unit, IA3):
        raise ValueError(
            f"{type(unit).__name__} cannot be merged: there it reads the input of the whole sublayer, not of the layer "
            "that it stands at"
        )


def _scratch(host: UnitLinear) -> nn.Linear:
    """Copy a layer's weights to merge into, so that a failure changes nothing.

    Raises:
        ValueError: If the weights are not in float32, in which merging would lose precision.
    """
    if host.weight.dtype != torch.float32:
        raise ValueError(f"its frozen weights are in {host.weight.dtype}: merge a model with frozen_dtype float32")
    copy = nn.Linear(host.in_features, host.out_features, bias=host.bias is not None, device="meta")
    copy.weight = nn.Parameter(host.weight.detach().clone(), requires_grad=False)
    if host.bias is not None:
        copy.bias = nn.Parameter(host.bias.detach().clone(), requires_grad=False)
    return copy


@torch.no_grad()
def merge_units(model: VLModel, task: str | None = None) -> VLModel:
    """Merge every unit into its linear layer and remove it; the model's function does not change.

    Args:
        model: Model to merge in place; it is not changed if an error is raised.
        task: For units with one instance per task, the task whose instance is merged.

    Returns:
        The model.

    Raises:
        ValueError: If a unit cannot be merged; the message names the unit and the reason.
    """
    if model.extension is not None:
        raise ValueError(
            f"{model.extension.settings()['class_path']} is a method of Hugging Face peft: merge it with peft's own "
            "merge_and_unload"
        )
    merged: dict[int, tuple[UnitLinear, nn.Linear]] = {}
    # units on the output first: they act on the layer's input after the unit on that input has been applied
    for side in ("output", "input"):
        for place in model.injected:
            unit = _unit(place, task)
            for name, host in _hosts(model, place):
                if (side == "output") != (host.unit is place.unit):
                    continue
                scratch = merged.setdefault(id(host), (host, _scratch(host)))[1]
                try:
                    if place.unit.positions != "all":
                        raise ValueError(
                            f"{type(unit).__name__} cannot be merged: it acts at {place.unit.positions} positions "
                            "only, and a merged weight acts at all"
                        )
                    if type(unit).merge is not Unit.merge:
                        _check_reach(unit, host, place)
                    unit.merge(scratch, side=side)
                except ValueError as error:
                    raise ValueError(f"layer {place.layer}, site {place.site!r} ({name}): {error}") from error
    for host, scratch in merged.values():
        host.weight.copy_(scratch.weight)
        if host.bias is not None:
            host.bias.copy_(scratch.bias)
        host.unit = host.input_unit = None
    _forget_units(model)
    return model


def _forget_units(model: VLModel) -> None:
    model.injected = []
    model.prompts = nn.ModuleDict()
    model.shared = nn.ModuleDict()
    model._context_readers = []
    model.trainable = {rule: names for rule, names in model.trainable.items() if rule != "pet"}
    model.recipe |= {"placements": [], "trainable": [rule for rule in model.recipe["trainable"] if rule != "pet"]}


def save_merged(
    model: VLModel, folder: str | Path, tokenizer: Any, *, backbone: str, task: str | None = None, **record: Any
) -> dict[str, Any]:
    """Merge a model's units and save the result as a new backbone, together with the visual embedding.

    The language model, including any other parameters trained in it, is saved in Hugging Face format and can be used as
    the ``backbone`` of a config. ``pet_model.safetensors`` is the matching export without units.

    Args:
        model: Model to merge, in place.
        folder: Output folder.
        tokenizer: Tokenizer with the added tokens, saved with the model.
        backbone: Name of the backbone on which the units were trained.
        task: As in :func:`merge_units`.
        record: Passed on to :func:`vlpet_lightning.save_pet`.

    Raises:
        ValueError: If a unit cannot be merged, or a part of the backbone is not loaded; nothing is written then.
    """
    model.backbone.check_whole(model.lm)
    before = {"method": f"{in_words(model.recipe)}; merged", "parameters": count_parameters(model).as_dict()}
    merge_units(model, task)
    model.requires_grad_(False)
    visual = model.visual_parameters()
    for parameter in visual.values():
        parameter.requires_grad_(True)
    model.recipe["trainable"] = ["visual_embedding"]
    model.trainable = {"visual_embedding": sorted(visual)}
    model.added_vocabulary = 0  # the saved language model includes the added rows
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.backbone.save_processor(backbone, folder)
    written = save_pet(model, folder, backbone=HERE, **record) | before | {"merged_from": backbone}
    write_record(folder, written)
    return written
