"""``pet_config.json``, the record of an export: writing, reading and validation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlpet_lightning.checksums import checksum
from vlpet_lightning.interop.export.model_card import model_card
from vlpet_lightning.pet.unit import Positions
from vlpet_lightning.version import __version__

FORMAT = 1
PEFT = "peft"  # format of a folder whose adapter is in a file of Hugging Face peft
WEIGHTS = "pet_model.safetensors"
CONFIG = "pet_config.json"
CARD = "README.md"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
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
PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "backbone": BACKBONE,
    "model": RECIPE,
    "weights": {"sha256": (str,)},
    "adapter": {"sha256": (str,)},  # of a folder in peft's format alone
}


def versions() -> dict[str, str]:
    """Return the versions of the packages that wrote a file."""
    return {"vlpet_lightning": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def write_record(folder: Path, record: Mapping[str, Any], notes: str = "", *, loadable: bool = True) -> None:
    """Write ``pet_config.json`` and the card; see :func:`model_card`."""
    (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
    (folder / CARD).write_text(model_card(record, notes, loadable=loadable))


def add_features(folder: Path, features: Mapping[str, Any]) -> None:
    """Add the record of the features that the model was trained on, by task, to ``pet_config.json``."""
    record = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(record | {"features": dict(features)}, indent=2) + "\n")


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
            if (folder / ADAPTER_CONFIG).is_file():
                cure = "it is in the format of Hugging Face peft: read it with peft.PeftModel"
            raise FileNotFoundError(f"no {name} in {str(folder)!r}: {cure}")
    try:
        record = json.loads((folder / CONFIG).read_text())
        found = record["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read ({error}): export again") from error
    if found not in (FORMAT, PEFT):
        raise ValueError(f"{folder / CONFIG} has format {found!r}, load_pet and pet_weights read {FORMAT} and {PEFT!r}")
    if found == PEFT and not (folder / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"no {ADAPTER_WEIGHTS} in {str(folder)!r}: copy the whole folder that export has written"
        )
    parts = [part for part in PARTS if part != "adapter" or found == PEFT]
    problems = [problem for part in parts for problem in _problems(record, part)]
    if problems:
        raise ValueError(f"{folder / CONFIG} {'; '.join(problems)}: export again")
    return record


def _problems(record: Mapping[str, Any], part: str) -> Iterator[str]:
    """Yield what a part of the record lacks, or holds with a wrong type."""
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
                or entry.get("positions", "all") not in get_args(Positions)
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
    """Return whether all nested ``{class_path, init_args}`` mappings are well-formed."""
    if isinstance(data, list):
        return all(map(_is_node, data))
    if not isinstance(data, dict) or not data.keys() & {"class_path", "init_args"}:
        return True
    path, settings = data.get("class_path"), data.get("init_args", {})
    return isinstance(path, str) and isinstance(settings, dict) and all(map(_is_node, settings.values()))


def read_tensors(
    folder: str | Path, record: Mapping[str, Any], name: str = WEIGHTS, part: str = "weights"
) -> dict[str, Tensor]:
    """Read a file of tensors that belongs to a record.

    Args:
        folder: Folder of the export.
        record: Its record.
        name: Name of the file.
        part: Entry of the record with the file's checksum.

    Raises:
        ValueError: If it is not the file that the record was written with.
    """
    path = Path(folder) / name
    if checksum(path) != record[part]["sha256"]:
        raise ValueError(f"{path} is damaged or of another export: its checksum is not that in {CONFIG}; copy it again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): export again") from error
