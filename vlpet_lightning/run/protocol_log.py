"""Write and log the protocol record of a run when a stage starts."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.interop.export.backbone_record import backbone_record
from vlpet_lightning.interop.export.model_card import in_words
from vlpet_lightning.interop.export.record import CONFIG
from vlpet_lightning.loggers import CSVLog
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import count_parameters
from vlpet_lightning.pet.serialization import to_plain
from vlpet_lightning.protocol import (
    BEST,
    FORMAT,
    ITEMS,
    LAST,
    UNKNOWN,
    WHOLE,
    digest,
    file_of,
    merged_items,
    name_of,
    read_record,
    scale_of,
    usual_checkpoint,
)
from vlpet_lightning.published import initial_weights, recognised
from vlpet_lightning.run.folder import run_folder
from vlpet_lightning.tasks import TASKS
from vlpet_lightning.version import __version__

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "pycocoevalcap")
OPTIMISATION = ("lr", "weight_decay", "warmup_ratio", "dropout", "frozen_dtype")  # of the module
LIMITS = {"train": "limit_train_batches", "val": "limit_val_batches", "test": "limit_test_batches"}
TRAINED = ("digest", "protocol", "seed", "items", "inputs", "splits", "versions")  # kept of the training's record


class ProtocolLog(Callback):
    """Record what a run's numbers depend on, in ``protocol.json`` (fit) or ``protocol_STAGE.json`` in its folder.

    The record names the protocol and its items, tasks, splits, decoding, scale, seed, backbone, method, versions, and
    the checksums of annotations and feature stores. It goes into W&B's config and prediction files, and its digest into
    the column ``protocol`` of ``metrics.csv``. A data module takes part by a method ``provenance(stage)``, as
    :meth:`data_modules.benchmark.BenchmarkDataModule.provenance`; without one, its settings are ``unknown``.

    The command line adds this callback to every run. Only rank 0 computes the record.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._start(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, "predict")

    def _start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trial = getattr(trainer, "fast_dev_run", False)
        log_dir = None if trial else trainer.log_dir  # a collective operation: all ranks must call it
        if not trainer.is_global_zero:
            return
        self.record = make_record(trainer, pl_module, stage)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLog):
                logger.protocol = self.record["digest"]
            elif isinstance(logger, WandbLogger):
                logger.log_hyperparams({Path(file_of(stage)).stem: self.record})
        if log_dir is not None:
            write_record(Path(log_dir), file_of(stage), self.record)


def record_of(trainer: Trainer) -> dict[str, Any]:
    """Return the record of the current stage; empty on other ranks than 0, and in runs without :class:`ProtocolLog`."""
    callbacks = getattr(trainer, "callbacks", [])
    return next((callback.record for callback in callbacks if isinstance(callback, ProtocolLog)), {})


def write_record(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write a record into a run folder; another record of this name stays as ``protocol-DIGEST.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    earlier = read_record(path)
    if earlier is not None and earlier.get("digest") != record["digest"]:
        os.replace(path, folder / f"protocol-{earlier['digest']}.json")
    with atomic_write(path, f".{os.getpid()}.part") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


# the record ----------------------------------------------------------------------------------------------------------


def make_record(trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Any]:
    """Return the record of a stage that starts.

    Args:
        trainer: The trainer.
        pl_module: The module; another one than :class:`VLModule` has no backbone, method and items in the record.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        TypeError: If the data module's ``provenance`` returns no mapping.
    """
    data = _provenance(trainer, stage)
    tasks = list(data.get("tasks", []))
    items = _module_items(trainer, pl_module) | {name: data.get("items", {}).get(name, UNKNOWN) for name in DATA_ITEMS}
    checkpoint = None if stage == "fit" or not trainer.ckpt_path else Path(str(trainer.ckpt_path))
    training = _training(trainer, pl_module, data)
    trained = None if stage == "fit" else _trained(pl_module, checkpoint)
    if stage != "fit":
        items["selected"] = selected(checkpoint, tasks, (trained or {"training": training})["training"]["max_epochs"])
    if trained is not None:
        items = merged_items(trained["items"], items)
        training = trained["training"]
    record: dict[str, Any] = {
        "format": FORMAT,
        "protocol": name_of(items, tasks),
        "stage": stage,
        "items": items,
        "tasks": tasks,
        "splits": _splits(trainer, data),
        "inputs": dict(data.get("inputs", {})),
        "generation": {name: _decoding(name) for name in tasks},
        "scale": {name: _scale(name) for name in tasks},
        "seed": _seed(),
        "training": training,
        **({} if trained is None else {"trained": {name: trained.get(name) for name in TRAINED}}),
        "checkpoint": None if checkpoint is None else checkpoint.name,
        **_model(pl_module, tasks),
        "versions": versions(),
    }
    record = json.loads(json.dumps(record, default=str))  # what a file gives back
    return record | {"digest": digest(record)}


DATA_ITEMS = [name for name, item in ITEMS.items() if item.setting.startswith("data.")]


def versions() -> dict[str, str]:
    """Return the versions of the packages that a number may depend on."""
    return {
        "vlpet_lightning": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def _provenance(trainer: Trainer, stage: str) -> Mapping[str, Any]:
    """Ask the data module for its part; a data module without this method has none."""
    data: Any = getattr(trainer, "datamodule", None)
    ask = getattr(data, "provenance", None)
    if ask is None:
        return {}
    found = ask(stage)
    if not isinstance(found, Mapping):
        raise TypeError(f"{type(data).__name__}.provenance must return a mapping, got {type(found).__name__}")
    return found


def _module_items(trainer: Trainer, pl_module: Any) -> dict[str, Any]:
    no_decay = getattr(pl_module, "no_decay", None)
    template = getattr(pl_module, "prompt_template", None)  # of decoder-only models
    return {
        **({} if template is None else {"template": template}),
        "mask_padding": getattr(pl_module, "mask_padding", UNKNOWN),
        "start": getattr(pl_module, "start", UNKNOWN),
        "no_decay": UNKNOWN if no_decay is None else sorted(no_decay),
        "precision": str(trainer.precision),
        "selected": None,
    }


def _training(trainer: Trainer, pl_module: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    limit = trainer.limit_train_batches
    return {
        **{name: getattr(pl_module, name, UNKNOWN) for name in OPTIMISATION},
        "optimizer": _optimizer(pl_module),
        "max_epochs": trainer.max_epochs,
        "max_steps": None if trainer.max_steps == -1 else trainer.max_steps,
        "gradient_clip_val": trainer.gradient_clip_val,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "limit_train_batches": None if limit in (None, 1.0) else limit,
        **data.get("training", {}),
    }


def _optimizer(pl_module: Any) -> Any:
    made = to_plain(getattr(pl_module, "optimizer", None))
    return made if isinstance(made, dict) and "class_path" in made else UNKNOWN


def _splits(trainer: Trainer, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data module's splits, with the part of them that the trainer uses."""
    found: dict[str, Any] = {}
    for split, tasks in data.get("splits", {}).items():
        name = "limit_predict_batches" if trainer.state.fn == TrainerFn.PREDICTING else LIMITS.get(split, "")
        limit = getattr(trainer, name, None)
        found[split] = {task: {**content, "part": _part(content, name, limit)} for task, content in tasks.items()}
    return found


def _part(content: Mapping[str, Any], name: str, limit: int | float | None) -> str:
    part = content.get("part", WHOLE)
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return part
    return f"{name} {limit}" if part == WHOLE else f"{part}, {name} {limit}"


def _decoding(task: str) -> Any:
    if task not in TASKS:
        return UNKNOWN
    how = TASKS[task].generation
    return "first step" if how is None else {"beams": how.num_beams, "max_length": how.max_length}


def _scale(task: str) -> str:
    if task not in TASKS:
        return UNKNOWN
    score = TASKS[task].score
    return f"{score}, {scale_of(score)}"


def _model(pl_module: Any, tasks: list[str]) -> dict[str, Any]:
    """Describe backbone, method and parameter counts; nothing of modules of another kind."""
    model = getattr(pl_module, "model", None)
    if not isinstance(model, VLModel):
        return {"backbone": {}, "method": {}, "parameters": {}}
    counts = count_parameters(model)
    recipe = model.recipe
    return {
        "backbone": backbone_record(model, pl_module.backbone_name),
        "method": {
            "summary": in_words(recipe),
            "published": recognised(model.backbone.kind, recipe, tasks),
            "initial_weights": initial_weights(recipe["placements"]),
            "feature_dim": recipe["feature_dim"],
            "grid": recipe["grid"],
            "projector": recipe["projector"],
        },
        "parameters": {"trainable": counts.trainable, "total": counts.total, "percent": round(counts.percent, 2)},
    }


# the training of a checkpoint ----------------------------------------------------------------------------------------


def _trained(pl_module: Any, checkpoint: Path | None) -> dict[str, Any] | None:
    """Return the record of the training that made a checkpoint or exported weights; None if it has none."""
    if checkpoint is not None:
        return read_record(run_folder(checkpoint) / file_of("fit"))
    weights = getattr(pl_module, "pet_weights", None)
    if weights is None:
        return None
    try:
        found = json.loads((Path(weights) / CONFIG).read_text())["protocol"]["record"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def selected(checkpoint: Path | None, tasks: Sequence[str], max_epochs: int | None) -> str:
    """Say how a checkpoint was selected: ``last epoch``, ``best validation``, or the epoch it is of.

    Args:
        checkpoint: The file; None for a model without one.
        tasks: Tasks of the run; of a checkpoint that is both, they decide what is said.
        max_epochs: Length of the training.
    """
    if checkpoint is None:
        return "no checkpoint"
    content = _opened(checkpoint)
    if content is None:
        return UNKNOWN
    epoch = content["epoch"] + 1
    found = [LAST] if max_epochs is not None and 0 < max_epochs <= epoch else []
    found += [BEST] if _is_best(checkpoint, content) else []
    usual = usual_checkpoint(tasks)
    return usual if usual in found else found[0] if found else f"epoch {epoch} of {max_epochs}"


def _opened(checkpoint: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint without reading its tensors; None if it cannot be read."""
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return {key: found[key] for key in ("epoch", "global_step", "callbacks")}
    except Exception:  # torch raises several kinds; a damaged checkpoint is reported where it is loaded
        return None


def _is_best(checkpoint: Path, content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the step of the best validation, as the newest checkpoint of its folder knows it."""
    siblings = (_opened(path) for path in checkpoint.parent.glob("*.ckpt"))
    newest = max((found for found in siblings if found is not None), key=lambda found: found["global_step"])
    states = [state for name, state in newest["callbacks"].items() if name.startswith(ModelCheckpoint.__name__)]
    names = [Path(state["best_model_path"]).name for state in states if state.get("monitor") == "val/average"]
    best = [_opened(checkpoint.parent / name) for name in names if name]
    return any(found is not None and found["global_step"] == content["global_step"] for found in best)
