"""Record of the image features that a model was trained on, and the encoder that makes such features.

``export`` saves the record of each task's feature store (its ``meta.json``) and the files that the encoder needs: the
architecture if open_clip does not know it by name, and the batch norm statistics of random weights. They are in the
folder ``encoder``; those of a task with another extractor than the first task's are in ``encoder/TASK``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlpet_lightning.checksums import checksum

if TYPE_CHECKING:
    from vlpet_lightning.vision.choice import AnyEncoder
    from vlpet_lightning.vision.encoders import EncoderSettings

ENCODER = "encoder"  # folder of an export with the encoder's files
CALIBRATION = "calibration.safetensors"
ARCHITECTURE = "architecture.json"
META = "meta.json"
# settings that identify an extractor; versions and paths may differ
IDENTITY = (
    "model",
    "config_sha256",
    "pretrained",
    "weights_sha256",
    "quick_gelu",
    "seed",
    "features",
    "pool",
    "image_size",
    "tiling",
    "mean",
    "std",
    "resize",
    "interpolation",
)
FIELDS: dict[str, type] = {"extractor": dict, "tokens": int, "dim": int}


def features_record(meta: Mapping[str, Any], store: Path | None = None) -> dict[str, Any]:
    """Return the record of features.

    Args:
        meta: ``meta.json`` of their store.
        store: Folder of the store, if it is local: the record then has the checksum of its encoder's statistics.
    """
    record = {name: meta[name] for name in FIELDS}
    if store is not None and (store / CALIBRATION).is_file():
        record["calibration_sha256"] = checksum(store / CALIBRATION)
    return record


def check_record(record: Any, where: str) -> None:
    """Check that a record has the fields that are read here.

    Raises:
        ValueError: If one is missing or of another type.
    """
    content = record if isinstance(record, Mapping) else {}
    wrong = [name for name, kind in FIELDS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise ValueError(f"{where} does not describe features (no valid {', '.join(wrong)}): copy or make it again")


def read_features_record(store: str | Path) -> dict[str, Any]:
    """Return the record of a feature store: its extractor, tokens and width.

    Raises:
        FileNotFoundError: If the folder is no feature store.
        ValueError: If its ``meta.json`` is damaged.
    """
    path = Path(store) / META
    if not path.is_file():
        raise FileNotFoundError(f"no feature store at {store} (there is no {META}): give the folder of a store")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): copy the store again") from error
    check_record(meta, str(path))
    return features_record(meta, Path(store))


def in_words(record: Mapping[str, Any]) -> str:
    """Describe the extractor of a record in a few words."""
    extractor = record["extractor"]
    if "model" not in extractor:
        return f"features of unknown origin ({json.dumps(extractor)})"
    if extractor.get("features") == "pixels":
        return f"images as {extractor['model']} reads them"
    size = "x".join(map(str, _identity(extractor).get("image_size", ["unknown"])))
    weights = extractor.get("pretrained") or f"random weights, seed {extractor.get('seed')}"
    pooled = f", pooled to {extractor['pool']}x{extractor['pool']}" if extractor.get("pool") else ""
    return f"{extractor['model']} ({weights}), {extractor.get('features', 'grid')} of {size} pixels{pooled}"


def _identity(extractor: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: extractor[name] for name in IDENTITY if name in extractor}
    if isinstance(found.get("image_size"), int):  # the published features' record has one number
        found["image_size"] = [found["image_size"]] * 2
    return {"model": None, **found}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return what differs between the extractors of two records, in words; a setting that only one has is left out."""
    one, other = _identity(theirs["extractor"]), _identity(ours["extractor"])
    found = [
        f"{name} {one[name]!r} there, {other[name]!r} in training"
        for name in IDENTITY
        if name in one and name in other and one[name] != other[name]
    ]
    if theirs["dim"] != ours["dim"]:
        found.append(f"{theirs['dim']} wide there, {ours['dim']} in training")
    statistics = [record.get("calibration_sha256") for record in (theirs, ours)]
    if None not in statistics and statistics[0] != statistics[1]:
        found.append(f"other values in {CALIBRATION}, the statistics of the random weights")
    return found


def check_same_extractor(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    """Refuse features of another extractor than a model was trained on.

    Args:
        theirs: Record of the features to use.
        ours: Record of the features that the model was trained on.
        where: Where the first record is from, for the message.

    Raises:
        ValueError: If they differ; names both, and the settings that differ.
    """
    found = differences(theirs, ours)
    if found:
        raise ValueError(
            f"the model was trained on {in_words(ours)}, and {where} has {in_words(theirs)}: {'; '.join(found)}. "
            "Use features of the model's own extractor"
        )


def save_encoder_files(store: str | Path, record: Mapping[str, Any], out: Path) -> None:
    """Copy the files of a store that rebuild its encoder.

    Args:
        store: Folder of the store.
        record: Its record.
        out: Folder to copy them to, ``encoder`` of an export.
    """
    names = {CALIBRATION: CALIBRATION, ARCHITECTURE: f"{record['extractor'].get('model')}.json"}
    found = {name: new for name, new in names.items() if (Path(store) / name).is_file()}
    for name, new in found.items():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(store) / name, out / new)


@contextmanager
def _architecture(record: Mapping[str, Any], folders: Sequence[Path], given: str | None) -> Iterator[str]:
    """Yield the name or file of the encoder's architecture, in a file whose name is the model's, as open_clip needs."""
    name = record["extractor"]["model"]
    if record["extractor"].get("config_sha256") is None or given is not None:
        yield given or name
        return
    files = [folder / file for folder in folders for file in (f"{name}.json", ARCHITECTURE)]
    found = next((path for path in files if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"the architecture {name}.json of the encoder is not in the export: give it by --architecture"
        )
    with tempfile.TemporaryDirectory() as place:
        yield str(shutil.copyfile(found, Path(place) / f"{name}.json"))


def build_encoder(
    record: Mapping[str, Any],
    folders: Sequence[Path] = (),
    *,
    device: str = "cpu",
    weights: str | None = None,
    architecture: str | None = None,
    own: tuple[str, Any] | None = None,
) -> AnyEncoder:
    """Build the encoder that makes the features of a record.

    Args:
        record: Record of a feature store.
        folders: Folders to search for the encoder's files, in order.
        device: Device that encodes.
        weights: File of the weights, if the record names a file.
        architecture: JSON file of the architecture, if open_clip does not know it and ``folders`` lack it.
        own: Name and :class:`~vlpet_lightning.model.VLModel` of a decoder-only model, which makes features with its
            own vision tower.

    Raises:
        FileNotFoundError: If the weights, the architecture or the statistics are missing.
        ValueError: If the record does not describe an encoder, or another encoder results.
    """
    from vlpet_lightning.vision.encoders import HF, Encoder
    from vlpet_lightning.vision.towers import TowerEncoder, recorded_settings

    extractor = dict(record["extractor"])
    if "model" not in extractor:
        raise ValueError(
            f"the model was trained on {in_words(record)}, which no encoder here can make: ask a model that was "
            "trained on features of `data extract images` or `data convert hub`"
        )
    if extractor["model"].startswith(HF):
        name, model = own or (extractor["model"].removeprefix(HF), None)
        given = {"model": f"{HF}{name}", "image_settings": recorded_settings(name, extractor)}
        tower = TowerEncoder(_settings(extractor | given), device, model)
        tower.check(extractor)
        return tower
    if extractor.get("weights_sha256") is not None:
        if weights is None:
            raise FileNotFoundError(
                f"the encoder's weights were the file {extractor['pretrained']}: give it by --encoder_weights"
            )
        _check_weights(weights, extractor)
        extractor["pretrained"] = weights
    elif weights is not None:
        raise ValueError(f"--encoder_weights {weights}: the model was trained on {in_words(record)}, give no file")
    with _architecture(record, folders, architecture) as model:
        encoder = Encoder(_settings(extractor | {"model": model}), device)
    check_same_extractor({"extractor": encoder.record, "dim": encoder.dim}, record, "the encoder built here")
    if encoder.needs_calibration:
        path = next((folder / CALIBRATION for folder in folders if (folder / CALIBRATION).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"the encoder's statistics {CALIBRATION} are missing: export again, or add --store")
        if record.get("calibration_sha256") not in (None, checksum(path)):
            raise ValueError(
                f"{path} is damaged or of another encoder (its checksum is not the recorded one): copy it again"
            )
        encoder.load_calibration(path)
    return encoder


def _settings(extractor: Mapping[str, Any]) -> EncoderSettings:
    from vlpet_lightning.vision.encoders import EncoderSettings

    known = {item.name for item in fields(EncoderSettings)}
    found = {name: value for name, value in extractor.items() if name in known and (name, value) != ("seed", None)}
    return EncoderSettings(**found)


def _check_weights(path: str, extractor: Mapping[str, Any]) -> None:
    """Check a file of weights before it is loaded."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: give the encoder's weights {extractor['pretrained']}")
    found = checksum(Path(path))
    if found != extractor["weights_sha256"]:
        raise ValueError(
            f"{path} has other weights (SHA-256 {found[:12]}...) than the encoder of the training, "
            f"{extractor['pretrained']} ({extractor['weights_sha256'][:12]}...): give that file by --encoder_weights"
        )
