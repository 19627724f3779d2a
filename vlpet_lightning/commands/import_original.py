"""The ``import-original`` command: convert command lines and checkpoints of VL-PET and related repositories."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from vlpet_lightning.backbones import config_of, first_line
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.interop.original.checkpoint import Matched, fill
from vlpet_lightning.interop.original.flags import parse_flags
from vlpet_lightning.interop.original.methods import Method, grid_of, method_from_flags
from vlpet_lightning.interop.original.nodes import tasks_of
from vlpet_lightning.interop.original.side_network import side_steps
from vlpet_lightning.tasks import IMAGE_TEXT, VIDEO_TEXT

CLASSES = {"bart": "vlpet_lightning.VLBart", "t5": "vlpet_lightning.VLT5"}
VIDEO_DIM = 512  # of VALUE's features; images have our default


def kind_of(backbone: str) -> str:
    """Return ``bart`` or ``t5``, by the original's rule: a substring of the name.

    Raises:
        ValueError: If the name contains neither.
    """
    for kind in CLASSES:
        if kind in backbone:
            return kind
    raise ValueError(f"--backbone {backbone!r} names neither bart nor t5: these are the original's backbones")


def words_of(flags: str) -> list[str]:
    """Split a quoted command line into words.

    Raises:
        ValueError: If a quote in it is not closed.
    """
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"--flags {flags!r} cannot be split into words ({error}): close the quote") from error


def experiment_of(tasks: Sequence[str]) -> str:
    """Return the experiment that a command line with these tasks (by our names) overlays.

    Raises:
        ValueError: For unknown tasks, or image and video tasks in one command line.
    """
    unknown = sorted(set(tasks) - {*IMAGE_TEXT, *VIDEO_TEXT})
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r} in --tasks: choose from {', '.join((*IMAGE_TEXT, *VIDEO_TEXT))}")
    videos = set(tasks) & set(VIDEO_TEXT)
    if videos and set(tasks) - videos:
        raise ValueError(f"--tasks {', '.join(tasks)}: images and videos are experiments of their own, name one kind")
    return "experiments/video_text.yaml" if videos else "experiments/image_text.yaml"


def config_from_flags(flags: Sequence[str]) -> tuple[dict[str, Any], Method]:
    """Convert an original command line to our config, an overlay of :func:`experiment_of` its tasks.

    Args:
        flags: The words of the command line.

    Returns:
        The config as plain data, and the method that was read.

    Raises:
        ValueError: For unknown flags, flags of a model that this library does not build, and as :func:`experiment_of`.
    """
    args = parse_flags(flags)
    tasks = tasks_of(args)
    videos = experiment_of(tasks) == experiment_of(VIDEO_TEXT)
    kind = kind_of(args.backbone)
    backbone = config_of(args.backbone, kind)
    if backbone.model_type != kind:
        raise ValueError(
            f"--backbone {args.backbone!r} is {backbone.model_type!r}: the original's backbones are BART and T5"
        )
    method = method_from_flags(args, kind, backbone.d_model)
    model: dict[str, Any] = {
        "backbone": args.backbone,
        "placements": method.placements,
        "trainable": method.trainable,
        "grid": grid_of(args),
        "dropout": args.dropout,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "warmup_ratio": args.warmup_ratio,
    }
    if videos:
        model["feature_dim"] = VIDEO_DIM
    if method.projector is not None:
        model["projector"] = method.projector
    data: dict[str, Any] = {"batch_size": args.batch_size, "eval_batch_size": args.valid_batch_size or args.batch_size}
    if tasks:
        data["tasks"] = tasks
    if not args.use_tasks_prompts:
        data["prompts"] = dict.fromkeys(tasks, "")
    config = {
        "seed_everything": args.seed,
        "trainer": {
            "max_epochs": args.epochs,
            "gradient_clip_val": args.clip_grad_norm if args.clip_grad_norm > 0 else None,
        },
        "model": {"class_path": CLASSES[kind], "init_args": model},
        "data": {"init_args": data},
    }
    return config, method


def yaml_of(flags: Sequence[str]) -> str:
    """Return the config of :func:`config_from_flags` as YAML.

    Comments name the flags that the original ignores, and commands to run before training.
    """
    config, method = config_from_flags(flags)
    experiment = experiment_of(config["data"]["init_args"].get("tasks", ()))
    head = [f"# Converted from an original command line; an overlay of {experiment}:"]
    head += ["#   " + line for line in _wrapped(" ".join(shlex.quote(flag) for flag in flags))]
    head += [f"# ignored by the original: {note}" for note in method.notes]
    head += [f"# {line}" for line in side_steps(parse_flags(flags), experiment)]

    class Plain(yaml.SafeDumper):
        """Dumper without anchors: equal nodes are written out."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    body = yaml.dump(config, Dumper=Plain, sort_keys=False, default_flow_style=None, width=110)
    return "\n".join(head) + "\n" + body


def _wrapped(text: str, width: int = 110) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint of the original, without executing code in it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold a state dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path!r}: give the original's LAST.pth or BEST.pth")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds
        raise ValueError(
            f"{path!r} cannot be read as a checkpoint without executing code: expected a state dict saved by "
            f"torch.save ({first_line(error)})"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not saved or not all(isinstance(t, torch.Tensor) for t in saved.values()):
        raise ValueError(f"{path!r} holds no state dict: expected tensors by name")
    return saved


def summary(matched: Matched) -> Table:
    """Return a table of the matched tensors, by part of our model."""
    table = Table(title=f"{len(matched.used)} tensors matched, {len(matched.ignored)} copies or unused")
    for heading in ("part of the model", "tensors", "parameters"):
        table.add_column(heading, justify="left" if heading == "part of the model" else "right")
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in matched.tensors.items():
        unit = ".unit." in name or ".input_unit." in name
        part = (
            "units" if unit else {"lm": "language model", "visual": "visual embedding"}.get(name.split(".")[0], "units")
        )
        parts.setdefault(part, []).append(tensor)
    for part, tensors in parts.items():
        table.add_row(part, str(len(tensors)), f"{sum(t.numel() for t in tensors):,}")
    return table


def import_original(words: Sequence[str]) -> None:
    """Convert an original command line to our config, or an original checkpoint to our format.

    Args:
        words: The command's arguments; ``--help`` lists them.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlpet_lightning import-original",
        description="With --flags alone: print our config for an original command line. With --checkpoint: load a "
        "state dict of VL-PET, VL-Adapter or Ladder Side-Tuning into the model of --config (or --flags), report the "
        "matches, and write its PET weights to --out.",
        allow_abbrev=False,
    )
    parser.add_argument("--flags", metavar="WORDS", help="the original's command-line flags, in quotes")
    parser.add_argument("--checkpoint", metavar="FILE", help="LAST.pth of the original")
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="a config of fit; several overlay"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for pet_model.safetensors and pet_config.json")
    known, overrides = parser.parse_known_args(_joined(words))
    if known.checkpoint is None:
        if known.flags is None:
            parser.error("give --flags, or --checkpoint with --config")
        if known.out is not None or known.config or overrides:
            parser.error("--flags without --checkpoint only prints a config: --out and --config need --checkpoint")
        sys.stdout.write(yaml_of(words_of(known.flags)))
        return
    if known.out is None or (not known.config and known.flags is None):
        parser.error("--checkpoint needs --out, and --config or --flags")
    _import_checkpoint(known, overrides)


def _joined(words: Sequence[str]) -> list[str]:
    """Join ``--flags`` and its value into one word: argparse takes a value that begins with a dash for an option."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == "--flags":
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _import_checkpoint(known: argparse.Namespace, overrides: list[str]) -> None:
    from vlpet_lightning.interop.export.pet_files import save_pet

    state_dict = read_checkpoint(known.checkpoint)
    arguments = [word for path in known.config for word in ("--config", path)] + overrides
    if known.flags is not None:
        arguments = _as_arguments(words_of(known.flags)) + arguments
    module = module_from_config(arguments)
    module.model = module.build(pretrained=False)  # every weight comes from the checkpoint
    matched = fill(module.model, state_dict)
    save_pet(module, known.out)
    console = Console()
    console.print(summary(matched))
    console.print(f"wrote {known.out}")


def _as_arguments(flags: Sequence[str]) -> list[str]:
    config, _ = config_from_flags(flags)
    model = config["model"]
    words = [f"--model.class_path={model['class_path']}"]
    return words + [f"--model.init_args.{key}={json.dumps(value)}" for key, value in model["init_args"].items()]
