"""``export``: a checkpoint's trained part as files that others can load."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlpet_lightning.atomic_file import check_folder
from vlpet_lightning.backbones import first_line
from vlpet_lightning.cli import ModelOnly
from vlpet_lightning.folder_lock import locked_folder
from vlpet_lightning.interop.export.merge import save_merged
from vlpet_lightning.interop.export.pet_files import save_pet
from vlpet_lightning.interop.hf.peft_format import save_peft
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.module import VLModule
from vlpet_lightning.run.folder import run_folder

PROTOCOL = ("prompts", "seeded_order", "answer_draw", "tasks", "batch_size")  # of the data module
OPTIMISATION = ("lr", "weight_decay", "no_decay", "warmup_ratio", "dropout")  # of the module


def parser() -> argparse.ArgumentParser:
    """Of the options of the verb itself."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning export",
        description="Write what a checkpoint holds beside the backbone: weights, what they belong to, and a card.",
        epilog="Any override that fit takes works here, e.g. --model.backbone DIR.",
        allow_abbrev=False,
    )
    found.add_argument("--ckpt_path", required=True, type=Path, metavar="FILE", help="a checkpoint of fit")
    found.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    found.add_argument(
        "--config", action="append", metavar="FILE", help="a config of fit; by default config.yaml in the run's folder"
    )
    found.add_argument(
        "--format", choices=("pet", "peft"), default="pet", help="peft: LoRA as Hugging Face peft has it"
    )
    found.add_argument(
        "--merge", action="store_true", help="fold the units into the language model and write all of it"
    )
    found.add_argument("--task", help="with --merge: the task whose unit to merge, where there is a unit a task")
    return found


def _configs(given: Sequence[str] | None, checkpoint: Path) -> list[Path]:
    missing = [path for path in given or () if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"no config at {missing[0]!r}: give the config that the run was trained with")
    if given:
        return [Path(path) for path in given]
    path = run_folder(checkpoint) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"no config.yaml at {path}: give the config that the run was trained with: --config FILE"
        )
    return [path]


def _parsed(configs: Sequence[Path], overrides: Sequence[str]) -> tuple[VLModule, Any]:
    """The module of the configs, and all of their settings."""
    words = [word for path in configs for word in ("--config", str(path))]
    cli = ModelOnly([*words, *overrides], run=False)
    return cli.model, cli.config


def _init_args(config: Any, section: str) -> dict[str, Any]:
    found = config.get(section)
    return {} if found is None else vars(found.get("init_args") or argparse.Namespace())


def protocol_of(config: Any, module: VLModule) -> dict[str, Any]:
    """The settings of a run that its scores depend on, as plain data."""
    data = _init_args(config, "data")
    items = {name: data[name] for name in PROTOCOL if name in data}
    items |= {name: getattr(module, name) for name in OPTIMISATION}
    trainer = config.get("trainer") or {}
    items |= {name: trainer[name] for name in ("max_epochs", "precision") if name in trainer}
    return {"seed": config.get("seed_everything"), **{name: _plain(value) for name, value in items.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def metrics_of(run: Path) -> dict[str, float]:
    """The last validation and test scores in a run's folder; none where it has none."""
    found: dict[str, float] = {}
    for row in read_metrics(run):
        found |= {name: value for name, value in row.items() if name.partition("/")[0] in ("val", "test")}
    return found


def load_checkpoint(module: VLModule, path: Path, seed: int | None) -> None:
    """Build the module and fill it from a checkpoint.

    Raises:
        ValueError: If it is of another method, or holds anything but tensors and plain values.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values: give one that fit has written "
            f"({first_line(error)})"
        ) from error
    if seed is not None:
        os.environ.setdefault("PL_GLOBAL_SEED", str(seed))
    module.pet_weights = None  # those that the run began with
    module.compile_model = False
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    module.eval()


def export(args: Sequence[str]) -> None:
    """Write a checkpoint's trained part as files.

    Args:
        args: ``--ckpt_path``, ``--out``, ``--config``, ``--format``, ``--merge``, ``--task``, ``--help``; everything
            else is read as the arguments of ``fit``.

    Raises:
        FolderInUse: If another process writes to ``--out``.
        FileExistsError: If ``--out`` is a file.
        FileNotFoundError: If the checkpoint, its config or the backbone is not there.
        ValueError: If the checkpoint is of another method than the config, or cannot be exported in that way.
    """
    known, overrides = parser().parse_known_args(args)
    if known.merge and known.format == "peft":
        raise ValueError("--merge leaves no units for --format peft: give one of them")
    if known.task and not known.merge:
        raise ValueError("--task says which unit to merge: give --merge with it")
    if not known.ckpt_path.is_file():
        raise FileNotFoundError(f"no checkpoint at {known.ckpt_path}: give a file of a run's `checkpoints` folder")
    check_folder(known.out)
    module, config = _parsed(_configs(known.config, known.ckpt_path), overrides)
    seed = config.get("seed_everything")
    load_checkpoint(module, known.ckpt_path, seed if isinstance(seed, int) and not isinstance(seed, bool) else None)
    said: dict[str, Any] = {"metrics": metrics_of(run_folder(known.ckpt_path)), "protocol": protocol_of(config, module)}
    model = module.built()
    with locked_folder(known.out, "the export", "choose another --out"):
        if known.merge:
            save_merged(model, known.out, module.tokenizer, backbone=module.backbone_name, task=known.task, **said)
        elif known.format == "peft":
            save_peft(model, known.out, backbone=module.backbone_name, **said)
        else:
            save_pet(module, known.out, **said)
    console = Console()
    for path in sorted(known.out.iterdir()):
        console.print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", soft_wrap=True, highlight=False)
