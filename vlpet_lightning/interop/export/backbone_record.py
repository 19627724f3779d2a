"""Record of the backbone that weights belong to: its kind, its sizes and checksums of a few frozen tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlpet_lightning.model import VLModel


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _watched(model: VLModel) -> dict[str, Tensor]:
    """Select the frozen tensors to checksum: the token embedding and a matrix of the first and last layer.

    Of a vision tower that runs, also the first and last matrix.
    """
    own = set(model.own_state())
    embedding = model.backbone.token_embedding(model.lm)
    name = next(name for name, p in model.named_parameters() if p is embedding)
    rows = len(embedding) - model.added_vocabulary
    found = {} if name in own else {name: embedding[:rows]}
    for stack in model.backbone.layers(model.lm):
        root = f"lm.{model.backbone.stack_path(stack)}."
        matrices = {
            key: p
            for key, p in model.named_parameters()
            if key.startswith(root) and p.dim() == 2 and key not in own and p is not embedding
        }
        ends = list(matrices)
        found |= {key: matrices[key] for key in (ends[:1] if stack == "encoder" else ends[-1:])}
    if model.backbone.reads_pixels:
        inside = {id(p) for part in model.backbone.tower_parts(model.lm) for p in part.parameters() if p.dim() > 1}
        tower = {key: p for key, p in model.named_parameters() if id(p) in inside and key not in own}
        ends = list(tower)
        found |= {key: tower[key] for key in (*ends[:1], *ends[-1:])}
    return found


def backbone_checksums(model: VLModel) -> dict[str, str]:
    """Return the SHA-256 of a few frozen tensors, by name."""
    return {name: _digest(tensor) for name, tensor in _watched(model).items()}


def backbone_record(model: VLModel, name: str) -> dict[str, Any]:
    """Record the backbone's properties that must match when the weights are loaded."""
    config = model.lm.config
    sizes = model.backbone.sizes(config)
    return {
        "kind": model.backbone.kind,
        "name": name,
        "revision": getattr(config, "_commit_hash", None),
        "vocabulary": len(model.backbone.token_embedding(model.lm)),
        "added_vocabulary": model.added_vocabulary,
        "sizes": sizes,
        "template": model.backbone.settings(),
        "checksums": model.backbone_checksums or backbone_checksums(model),
    }


def _settings(template: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a decoder-only model; how it gets its images does not change what it computes."""
    return {"template": template and {name: value for name, value in template.items() if name != "pixels"}}


def _may_lack(model: VLModel, name: str) -> bool:
    """Whether a tensor is part of a vision tower that the model does not run."""
    tower = getattr(model.backbone, "tower_path", None)
    return tower is not None and not model.backbone.reads_pixels and name.startswith(f"lm.{tower}.")


def check_backbone(theirs: Mapping[str, Any], model: VLModel, name: str) -> None:
    """Check that a model has the recorded backbone.

    Args:
        theirs: The record.
        model: Model whose backbone is compared.
        name: Name of the model's backbone, for the message.

    Raises:
        ValueError: If the backbones differ; the message names the differences.
    """
    ours = backbone_record(model, name)
    keys = ("kind", "vocabulary", "added_vocabulary")
    there = {**theirs["sizes"], **{key: theirs.get(key) for key in keys}, **_settings(theirs.get("template"))}
    here = {**ours["sizes"], **{key: ours[key] for key in keys}, **_settings(ours["template"])}
    differences = [
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in sorted(set(there) | set(here))
        if there.get(key) != here.get(key)
    ]
    if not differences:
        differences = [
            f"other values in {key}"
            for key, digest in theirs["checksums"].items()
            if ours["checksums"].get(key) != digest and not _may_lack(model, key)
        ]
    if differences:
        raise ValueError(
            f"these weights were trained on the backbone {theirs['name']!r}, not on {name!r}: "
            f"{'; '.join(differences)}. Give the backbone that they were trained on"
        )
