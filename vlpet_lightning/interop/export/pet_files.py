"""The trained part of a model as a few files: weights, a record and a model card, without the backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlpet_lightning.backbones import BACKBONES, config_of, vocabulary_size
from vlpet_lightning.checksums import checksum
from vlpet_lightning.interop.export.backbone_record import backbone_record, check_backbone
from vlpet_lightning.interop.export.model_card import HERE, factory_in_words, in_words
from vlpet_lightning.interop.export.record import (
    ADAPTER_WEIGHTS,
    CONFIG,
    FORMAT,
    PEFT,
    RECIPE,
    WEIGHTS,
    read_record,
    read_tensors,
    versions,
    write_record,
)
from vlpet_lightning.interop.hf.adapter import adapter_names, adapter_tensors
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import ModelHolder, count_parameters, unit_differences
from vlpet_lightning.pet.serialization import check_written, placements_from_plain, positions_in_words, recorded

ADDED_ROWS = "added_vocabulary"  # name of the token embedding's added rows among the tensors
BACKBONE_SHARE = 0.05  # an export is refused where more of the backbone than this was trained


class NamedHolder(ModelHolder, Protocol):
    """A LightningModule, as far as an export reads it."""

    backbone_name: str


# the method of a set of weights ------------------------------------------------------------------------------------


def _units(placements: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {
        site: factory_in_words(entry["unit"]) + positions_in_words(entry)
        for entry in placements
        for site in entry["at"]
    }


def _check_recipe(theirs: Mapping[str, Any], model: VLModel) -> None:
    check_written(model.recipe)
    ours = json.loads(json.dumps(model.recipe))
    theirs = {**theirs, "trainable": sorted(theirs["trainable"])}
    ours["trainable"].sort()
    differences = unit_differences(_units(theirs["placements"]), _units(ours["placements"]))
    differences += [
        f"{key}: {json.dumps(theirs.get(key))} there, {json.dumps(ours.get(key))} here"
        for key in RECIPE
        if key != "placements" and theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise ValueError(
            f"these weights are of another method: {'; '.join(differences)}. Give the settings in {CONFIG}, or build "
            "the model from it: vlpet_lightning.load_pet"
        )


# saving --------------------------------------------------------------------------------------------------------------


def tensors_to_save(model: VLModel) -> dict[str, Tensor]:
    """Return copies of all tensors that the backbone lacks, by our names."""
    found = {name: tensor.detach().cpu().clone() for name, tensor in model.own_state().items()}
    rows = model.added_rows
    return found if rows is None else found | {ADDED_ROWS: rows.cpu().clone()}


def check_exportable(model: VLModel) -> None:
    """Check that the model is a frozen backbone with few trained parameters, apart from units and visual embedding.

    Raises:
        ValueError: If much of the backbone itself was trained.
    """
    own = {*model.unit_parameters(), *model.visual_parameters()}
    trained = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and name.startswith("lm.") and name not in own
    )
    if trained > BACKBONE_SHARE * model.backbone_parameters:
        raise ValueError(
            f"{trained:,} of the backbone's {model.backbone_parameters:,} parameters were trained (rules "
            f"{', '.join(model.recipe['trainable'])}): this is not a PET export, which never holds the backbone; keep "
            "the checkpoint, or write the whole model with `export --merge`"
        )


def save_pet(
    model: VLModel | NamedHolder,
    folder: str | Path,
    *,
    backbone: str | None = None,
    metrics: Mapping[str, float] | None = None,
    protocol: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a trained model without its backbone.

    >>> import tempfile
    >>> import vlpet_lightning as vl
    >>> from vlpet_lightning.pet import LoRA, Placement
    >>> backbone = vl.random_backbone(tempfile.mkdtemp(), ["what color is it ?", "red"], width=32)
    >>> model = vl.build(backbone, Placement("encoder.attn.query", LoRA.with_(rank=4)), feature_dim=16)
    >>> record = vl.save_pet(model, backbone / "lora")
    >>> record["method"]
    'LoRA(rank=4, alpha=32.0, dropout=0.1) at encoder.attn.query; trained: pet, visual_embedding'
    >>> sorted(path.name for path in (backbone / "lora").iterdir())
    ['README.md', 'pet_config.json', 'pet_model.safetensors']

    Args:
        model: The model, or the module that holds it.
        folder: Where to write ``pet_model.safetensors``, ``pet_config.json`` and ``README.md``.
        backbone: The backbone's name, for the record; the module knows it.
        metrics: Scores by name, for the record and the card.
        protocol: Settings of the training run, for the record.
        tensors: Write these instead of all that the backbone does not bring.

    Returns:
        What is in ``pet_config.json``.

    Raises:
        ValueError: If much of the backbone was trained, or a unit cannot be written down; nothing is written then.
    """
    if not isinstance(model, VLModel):
        backbone = backbone or model.backbone_name
        model = model.built()
    check_exportable(model)
    check_written(model.recipe)
    tensors = tensors_to_save(model) if tensors is None else dict(tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS
    save_file(dict(tensors), weights, metadata={"format": "pt"})
    record = {
        "format": FORMAT,
        "method": in_words(model.recipe),
        "backbone": backbone_record(model, backbone or model.lm.config.name_or_path),
        "model": {key: model.recipe[key] for key in RECIPE},
        "protocol": dict(protocol or {}),
        "parameters": count_parameters(model).as_dict(),
        "metrics": dict(metrics or {}),
        "versions": versions(),
        "weights": {
            "sha256": checksum(weights),
            "tensors": len(tensors),
            "bytes": weights.stat().st_size,
        },
    }
    write_record(folder, record)
    return record


# loading -------------------------------------------------------------------------------------------------------------


def _check_tensors(tensors: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in sorted(set(mine) - set(tensors))]
    problems += [f"{name} is not of this model" for name in sorted(set(tensors) - set(mine))]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} there, {tuple(mine[name].shape)} here"
        for name in sorted(set(mine) & set(tensors))
        if tensors[name].shape != mine[name].shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit the model: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
            + f". Give a model with the settings in {CONFIG}"
        )


def load_weights(model: VLModel, folder: str | Path) -> dict[str, Any]:
    """Fill a model with exported weights.

    Args:
        model: Must have the backbone and the settings that the weights were trained with.
        folder: Written by ``export`` or :func:`save_pet`.

    Returns:
        What is in ``pet_config.json``.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file is damaged, or the model is another; nothing is changed then.
    """
    record = read_record(folder)
    _check_recipe(record["model"], model)
    check_backbone(record["backbone"], model, model.lm.config.name_or_path)
    tensors = read_tensors(folder, record)
    mine = model.own_state() | ({} if model.added_rows is None else {ADDED_ROWS: model.added_rows})
    if record["format"] == PEFT:
        elsewhere = adapter_names(model)
        mine = {name: tensor for name, tensor in mine.items() if name not in elsewhere} | adapter_tensors(model)
        tensors |= read_tensors(folder, record, ADAPTER_WEIGHTS, "adapter")
    _check_tensors(tensors, mine)
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])  # what `mine` holds shares its memory with the model
    return record


def load_pet(
    folder: str | Path, backbone: str | None = None, *, allow: Sequence[str] = (), dropout: float = 0.1
) -> VLModel:
    """The model that exported weights belong to, filled with them.

    >>> import tempfile
    >>> import torch
    >>> import vlpet_lightning as vl
    >>> from vlpet_lightning.pet import VLPET, Placement
    >>> backbone = vl.random_backbone(tempfile.mkdtemp(), ["what color is it ?", "red"], width=32)
    >>> model = vl.build(backbone, Placement("encoder.ffn", VLPET.with_(rank=4)), feature_dim=16, grid=None)
    >>> batch = vl.make_batch(model, "vqa", ["what color is it ?"], torch.randn(1, 4, 16), ["red"])
    >>> _ = vl.save_pet(model, backbone / "pet")
    >>> again = vl.load_pet(backbone / "pet")
    >>> torch.equal(again(batch), model.eval()(batch))
    True

    Args:
        folder: Written by ``export`` or :func:`save_pet`.
        backbone: Folder or hub name of the pretrained language model; the name in the record if left out.
        allow: Classes (or packages) of other libraries that ``pet_config.json`` may name beside those of
            ``vlpet_lightning.pet`` and the methods of peft. Nothing else is ever imported or run.
        dropout: Everywhere in the language model, should it be trained further.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: If a file or the backbone is not there.
        ValueError: If a file is damaged, the backbone another, or a class not allowed.
    """
    record = read_record(folder)
    recipe, theirs = record["model"], record["backbone"]
    source = str(Path(folder) / CONFIG)
    placements = placements_from_plain(recipe["placements"], allow, source)
    projector = recipe["projector"] and recorded(recipe["projector"], allow, f"{source}: projector")
    extension = None if recipe["peft"] is None else HFPeft(recipe["peft"])
    if theirs["kind"] not in BACKBONES:
        raise ValueError(f"no backbone {theirs['kind']!r}: choose from {', '.join(sorted(BACKBONES))}")
    name = backbone or (str(folder) if theirs["name"] == HERE else theirs["name"])
    kind = BACKBONES[theirs["kind"]].with_settings(name, theirs.get("template"))
    config = config_of(name, kind.kind)
    if config.model_type != kind.kind:
        raise ValueError(f"these weights need a {kind.kind} backbone, {name!r} is {config.model_type!r}")
    vocabulary = vocabulary_size(name, config)
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        model = VLModel(
            kind,
            kind.load(name, vocabulary, dropout),
            feature_dim=recipe["feature_dim"],
            grid=recipe["grid"],
            placements=placements,
            trainable=recipe["trainable"],
            added_vocabulary=vocabulary - kind.text_config(config).vocab_size,
            mask_padding=recipe["mask_padding"],
            projector=projector,
            extension=extension,
        )
        if recipe["start"] == "identity":
            model.start_as_identity()
    load_weights(model, folder)
    return model.eval()
