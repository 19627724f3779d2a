"""Check that a resumed run has the config it was started with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = "config.yaml"
SECTIONS = ("seed_everything", "model", "data")  # length, devices and callbacks of a run may change
SHOWN = 3
LONGEST = 60
MAY_DIFFER = {
    # data paths, data loading, and evaluation during training
    *(f"data.init_args.{name}" for name in ("root", "features", "images", "num_workers", "bank", "stream")),
    "data.init_args.token_cache",
    *(f"data.init_args.{name}" for name in ("eval_batch_size", "eval_by_length", "limit_eval")),
    "data.init_args.seed",  # a resumed run keeps that of its checkpoint
    *(f"model.init_args.{name}" for name in ("compile_model", "cuda_graphs", "generation_graphs")),
    # compared by their effect in VLModule.on_load_checkpoint, because null stands for a default
    *(f"model.init_args.{name}" for name in ("no_decay", "trainable")),
}


class OtherRun(ValueError):
    """The run's name belongs to a run with another config."""


def check_same(folder: Path, config: Mapping[str, Any], cure: str) -> None:
    """Refuse to resume a run with another seed, model or data.

    Args:
        folder: Folder of the run.
        config: Resolved config of this start; missing sections are not compared.
        cure: Advice for the error message.

    Raises:
        OtherRun: If settings differ; names the first of them.
    """
    try:
        theirs = yaml.safe_load((folder / FILE).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # possibly torn by a kill
    if not isinstance(theirs, dict):
        return
    found = [
        difference
        for name in SECTIONS
        if name in theirs and name in config
        for difference in _differences(name, theirs[name], config[name])
    ]
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise OtherRun(f"{folder} is a run of another config: {'; '.join(found[:SHOWN])}{more}. {cure}")


def _differences(name: str, there: Any, here: Any) -> Iterator[str]:
    if name in MAY_DIFFER or _same(there, here):
        return
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            # all settings of a class are saved: a key on one side only is from another version of the class
            if not name.endswith("init_args") or (key in there and key in here):
                yield from _differences(f"{name}.{key}", there.get(key), here.get(key))
    elif _are_dicts(there) and _are_dicts(here) and len(there) == len(here):
        for number, (one, other) in enumerate(zip(there, here, strict=True)):
            yield from _differences(f"{name}.{number}", one, other)
    else:
        yield f"{name}: {_short(there)} there, {_short(here)} here"


def _are_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _same(there: Any, here: Any) -> bool:
    if isinstance(there, str) and isinstance(here, str):
        return there == here or _same_path(there, here)
    if isinstance(there, bool) or isinstance(here, bool):
        return there is here
    return there == here or (_is_nothing(there) and _is_nothing(here))


def _is_nothing(value: Any) -> bool:
    return value is None or value == [] or value == {}


def _same_path(there: str, here: str) -> bool:
    """Whether two names may be one file: the working directory may differ, and a hub name may be a local folder."""
    if os.path.realpath(there) == os.path.realpath(here):
        return True
    one, other = Path(there), Path(here)
    if one.is_absolute() == other.is_absolute():
        # staged on the local disk of another node
        return one.is_absolute() and one.name == other.name and not one.exists()
    whole, end = (one, other) if one.is_absolute() else (other, one)
    parts = Path(os.path.normpath(end)).parts
    return bool(parts) and whole.parts[-len(parts) :] == parts


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
