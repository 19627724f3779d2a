"""The trained part of a model as a few files: weights, what they belong to, and a card; never the backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlpet_lightning.backbones import BACKBONES, config_of, vocabulary_size
from vlpet_lightning.interop.export.backbone_record import backbone_record, check_backbone
from vlpet_lightning.interop.export.model_card import HERE, factory_in_words, in_words, model_card
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import count_parameters, unit_differences
from vlpet_lightning.pet.serialization import check_written, placements_from_plain, recorded
from vlpet_lightning.version import __version__

FORMAT = 1
WEIGHTS = "pet_model.safetensors"
CONFIG = "pet_config.json"
CARD = "README.md"
ADDED_ROWS = "added_vocabulary"  # name of the token embedding's added rows among the tensors
BACKBONE_SHARE = 0.05  # an export is refused where more of the backbone than this was trained
# what is compared of the record, with the types that JSON gives it
BACKBONE: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "name": (str,),
    "vocabulary": (int,),
    "added_vocabulary": (int,),
    "sizes": (dict,),
    "checksums": (dict,),
}
RECIPE: dict[str, tuple[type, ...]] = {
    "feature_dim": (int,),
    "grid": (int, NoneType),
    "mask_padding": (bool,),
    "projector": (dict, str, NoneType),
    "start": (str,),
    "placements": (list,),
    "trainable": (list,),
    "peft": (dict, NoneType),
}
SIZES = ("feature_dim", "grid", "vocabulary")


class ModelHolder(Protocol):
    """A LightningModule, as far as an export reads it."""

    backbone_name: str

    def built(self) -> VLModel: ...


# what a set of weights belongs to ------------------------------------------------------------------------------------


def _units(placements: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {site: factory_in_words(entry["unit"]) for entry in placements for site in entry["at"]}


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


# out ---------------------------------------------------------------------------------------------------------------


def tensors_to_save(model: VLModel) -> dict[str, Tensor]:
    """What the backbone does not bring, by our names, each tensor with a storage of its own."""
    found = {name: tensor.detach().cpu().clone() for name, tensor in model.own_state().items()}
    rows = model.added_rows
    return found if rows is None else found | {ADDED_ROWS: rows.cpu().clone()}


def check_exportable(model: VLModel) -> None:
    """Check that the model is a frozen backbone with something small beside it.

    Raises:
        ValueError: If much of the backbone itself was trained.
    """
    pet = model.unit_parameters()
    trained = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and name.startswith("lm.") and name not in pet
    )
    if trained > BACKBONE_SHARE * model.backbone_parameters:
        raise ValueError(
            f"{trained:,} of the backbone's {model.backbone_parameters:,} parameters were trained (rules "
            f"{', '.join(model.recipe['trainable'])}): this is not a PET export, which never holds the backbone; keep "
            "the checkpoint, or write the whole model with `export --merge`"
        )


def versions() -> dict[str, str]:
    """Versions of what made a file."""
    return {"vlpet_lightning": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def save_pet(
    model: VLModel | ModelHolder,
    folder: str | Path,
    *,
    backbone: str | None = None,
    metrics: Mapping[str, float] | None = None,
    protocol: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a trained model without its backbone.

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
            "sha256": _file_digest(weights),
            "tensors": len(tensors),
            "bytes": weights.stat().st_size,
        },
    }
    write_record(folder, record)
    return record


def write_record(folder: Path, record: Mapping[str, Any], notes: str = "", *, loadable: bool = True) -> None:
    """Write ``pet_config.json`` and the card; see :func:`model_card`."""
    (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
    (folder / CARD).write_text(model_card(record, notes, loadable=loadable))


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# in ----------------------------------------------------------------------------------------------------------------


def read_record(folder: str | Path) -> dict[str, Any]:
    """``pet_config.json`` of a folder.

    Raises:
        FileNotFoundError: If it or the weights are not there.
        ValueError: If it cannot be read.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            cure = "give a folder that `python -m vlpet_lightning export` has written"
            if (folder / "adapter_config.json").is_file():
                cure = "it is in the format of Hugging Face peft: read it with peft.PeftModel"
            raise FileNotFoundError(f"no {name} in {str(folder)!r}: {cure}")
    try:
        record = json.loads((folder / CONFIG).read_text())
        found = record["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read ({error}): export again") from error
    if found != FORMAT:
        raise ValueError(f"{folder / CONFIG} has format {found!r}, load_pet and pet_weights read {FORMAT}")
    problems = [problem for part in PARTS for problem in _problems(record, part)]
    if problems:
        raise ValueError(f"{folder / CONFIG} {'; '.join(problems)}: export again")
    return record


PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "backbone": BACKBONE,
    "model": RECIPE,
    "weights": {"sha256": (str,)},
}


def _problems(record: Mapping[str, Any], part: str) -> Iterator[str]:
    """What a part of the record lacks, or has of a type that JSON does not give it."""
    content = record.get(part)
    if not isinstance(content, dict):
        yield f"lacks {part}" if content is None else f"has {part} {content!r}"
        return
    for key, types in PARTS[part].items():
        if key not in content:
            yield f"lacks {part}.{key}"
        elif not _is_value(key, content[key], types):
            yield f"has {part}.{key} {content[key]!r}"
    if part == "model" and isinstance(content.get("placements"), list):
        for number, entry in enumerate(content["placements"]):
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("at"), list)
                or not all(isinstance(name, str) for name in entry["at"])
                or "unit" not in entry
                or not _is_node(entry["unit"])
            ):
                yield f"has model.placements[{number}] {entry!r}"


def _is_value(key: str, value: Any, types: tuple[type, ...]) -> bool:
    known = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if not known:
        return False
    if key == "trainable":
        return all(isinstance(name, str) for name in value)
    return key not in SIZES or value is None or value > 0


def _is_node(data: Any) -> bool:
    """Whether what looks like ``{class_path, init_args}`` is one, all the way down."""
    if isinstance(data, list):
        return all(map(_is_node, data))
    if not isinstance(data, dict) or not data.keys() & {"class_path", "init_args"}:
        return True
    path, settings = data.get("class_path"), data.get("init_args", {})
    return isinstance(path, str) and isinstance(settings, dict) and all(map(_is_node, settings.values()))


def read_tensors(folder: str | Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """``pet_model.safetensors`` of a folder.

    Raises:
        ValueError: If it is not the file that the record was written with.
    """
    path = Path(folder) / WEIGHTS
    if _file_digest(path) != record["weights"]["sha256"]:
        raise ValueError(f"{path} is damaged or of another export: its checksum is not that in {CONFIG}; copy it again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): export again") from error


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
    _check_tensors(tensors, mine)
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])  # what `mine` holds shares its memory with the model
    return record


def load_pet(
    folder: str | Path, backbone: str | None = None, *, allow: Sequence[str] = (), dropout: float = 0.1
) -> VLModel:
    """The model that exported weights belong to, filled with them.

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
    kind = BACKBONES[theirs["kind"]]
    name = backbone or (str(folder) if theirs["name"] == HERE else theirs["name"])
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
            added_vocabulary=vocabulary - config.vocab_size,
            mask_padding=recipe["mask_padding"],
            projector=projector,
            extension=extension,
        )
        if recipe["start"] == "identity":
            model.start_as_identity()
    load_weights(model, folder)
    return model.eval()
