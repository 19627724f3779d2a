"""The ``export`` command: write a checkpoint's trained weights as files that others can load."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vlpet_lightning.atomic_file import check_folder
from vlpet_lightning.cli import DataOnly, ModelOnly
from vlpet_lightning.folder_lock import locked_folder
from vlpet_lightning.interop.export.merge import save_merged
from vlpet_lightning.interop.export.pet_files import save_pet
from vlpet_lightning.interop.export.record import add_features
from vlpet_lightning.interop.hf.peft_format import save_peft
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.module import VLModule
from vlpet_lightning.protocol import file_of, read_record
from vlpet_lightning.run.folder import run_folder
from vlpet_lightning.run.restore import load_checkpoint, seed_of
from vlpet_lightning.vision.features import ENCODER, differences, features_record, save_encoder_files

PROTOCOL = ("prompts", "seeded_order", "answer_draw", "length_buckets", "tasks", "batch_size")  # of the data module
OPTIMISATION = ("lr", "weight_decay", "no_decay", "warmup_ratio", "dropout", "frozen_dtype")  # of the module


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own options."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning export",
        description="Write a checkpoint's weights without the backbone, with a record of their model and a model card.",
        epilog="Any override that fit takes works here, e.g. --model.backbone DIR.",
        allow_abbrev=False,
    )
    found.add_argument("--ckpt_path", required=True, type=Path, metavar="FILE", help="a checkpoint of fit")
    found.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    found.add_argument(
        "--config", action="append", metavar="FILE", help="a config of fit; by default config.yaml in the run's folder"
    )
    found.add_argument(
        "--format", choices=("pet", "peft"), default="pet", help="peft: LoRA in the format of Hugging Face peft"
    )
    found.add_argument(
        "--merge", action="store_true", help="merge the units into the language model and write the whole model"
    )
    found.add_argument("--task", help="with --merge: the task whose unit to merge, for methods with one unit per task")
    return found


def configs_of(given: Sequence[str] | None, checkpoint: Path, option: str = "--config") -> list[Path]:
    """Return the configs of a checkpoint: those given, or ``config.yaml`` in its run's folder.

    Args:
        given: Paths on the command line.
        checkpoint: File of a run's ``checkpoints`` folder.
        option: Option that gives them, for messages.

    Raises:
        FileNotFoundError: If there is none.
    """
    missing = [path for path in given or () if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"no config at {missing[0]!r}: give the config that the run was trained with")
    if given:
        return [Path(path) for path in given]
    path = run_folder(checkpoint) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"no config.yaml at {path}: give the config that the run was trained with: {option} FILE"
        )
    return [path]


def _parsed(configs: Sequence[Path], overrides: Sequence[str]) -> tuple[VLModule, Any]:
    """Return the module of the configs, and all their settings."""
    words = [word for path in configs for word in ("--config", str(path))]
    cli = ModelOnly([*words, *overrides], run=False)
    return cli.model, cli.config


def _init_args(config: Any, section: str) -> dict[str, Any]:
    found = config.get(section)
    return {} if found is None else vars(found.get("init_args") or argparse.Namespace())


def protocol_of(config: Any, module: VLModule) -> dict[str, Any]:
    """Return the settings of a run that its scores depend on, as plain data."""
    data = _init_args(config, "data")
    items = {name: data[name] for name in PROTOCOL if name in data}
    items |= {name: getattr(module, name) for name in OPTIMISATION}
    trainer = config.get("trainer") or {}
    items |= {name: trainer[name] for name in ("max_epochs", "precision") if name in trainer}
    return {"seed": config.get("seed_everything"), **{name: _plain(value) for name, value in items.items()}}


def records_of(run: Path) -> dict[str, Any]:
    """Return the protocol records in a run's folder: ``record`` of its training, ``test_record`` of its test."""
    found = {"record": read_record(run / file_of("fit")), "test_record": read_record(run / file_of("test"))}
    return {name: record for name, record in found.items() if record is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def metrics_of(run: Path) -> dict[str, float]:
    """Return the last validation and test scores in a run's folder, if there are any."""
    found: dict[str, float] = {}
    for row in read_metrics(run):
        found |= {name: value for name, value in row.items() if name.partition("/")[0] in ("val", "test")}
    return found


def export(args: Sequence[str]) -> None:
    """Write a checkpoint's trained weights as files.

    Args:
        args: ``--ckpt_path``, ``--out``, ``--config``, ``--format``, ``--merge``, ``--task``, ``--help``; all other
            arguments are those of ``fit``.

    Raises:
        FolderInUse: If another process writes to ``--out``.
        FileExistsError: If ``--out`` is a file.
        FileNotFoundError: If the checkpoint, its config or the backbone is not there.
        ValueError: If the checkpoint and the config have different methods, or the method has no such export.
    """
    known, overrides = parser().parse_known_args(args)
    if known.merge and known.format == "peft":
        raise ValueError("--merge leaves no units for --format peft: give only one of the two")
    if known.task and not known.merge:
        raise ValueError("--task selects the unit to merge: give it together with --merge")
    if not known.ckpt_path.is_file():
        raise FileNotFoundError(f"no checkpoint at {known.ckpt_path}: give a file of a run's `checkpoints` folder")
    check_folder(known.out)
    module, config = _parsed(configs_of(known.config, known.ckpt_path), overrides)
    seed = seed_of(config.get("seed_everything"))
    protocol = protocol_of(config, module)  # before settings of training are reset
    protocol |= records_of(run_folder(known.ckpt_path))
    module.loads_whole_backbone = known.merge
    load_checkpoint(module, known.ckpt_path, seed)
    said: dict[str, Any] = {"metrics": metrics_of(run_folder(known.ckpt_path)), "protocol": protocol}
    model = module.built()
    with locked_folder(known.out, "the export", "choose another --out"):
        if known.merge:
            save_merged(model, known.out, module.tokenizer, backbone=module.backbone_name, task=known.task, **said)
        elif known.format == "peft":
            save_peft(model, known.out, backbone=module.backbone_name, **said)
        else:
            save_pet(module, known.out, **said)
        lacking = _save_features(configs_of(known.config, known.ckpt_path), overrides, known.out, module)
    console = Console()
    for path in sorted(path for path in known.out.rglob("*") if path.is_file()):
        console.print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", soft_wrap=True, highlight=False)
    if lacking:
        console.print(
            f"the features of the run are not recorded ({lacking}): `ask` needs --store", style="yellow", soft_wrap=True
        )


def _save_features(configs: Sequence[Path], overrides: Sequence[str], out: Path, module: VLModule) -> str:
    """Record the run's features in the export, with the files of their encoder.

    Returns:
        The reason if they could not be recorded, else an empty text. The export is complete without them, as the
        features may be on another machine.
    """
    words = [word for path in configs for word in ("--config", str(path))]
    try:
        data: Any = DataOnly([*words, *overrides], run=False).data
        module.use_data(data)
        stores = data.feature_stores() if hasattr(data, "feature_stores") else {}
    except (OSError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    records = {task: features_record(meta, folder) for task, (meta, folder) in stores.items()}
    for task, (_, folder) in stores.items():
        if folder is not None:
            first = next(iter(records.values()))
            own = out / ENCODER / task if differences(records[task], first) else out / ENCODER
            save_encoder_files(folder, records[task], own)
    add_features(out, records)
    return "" if stores else "its data module names no feature stores"
