"""Whether a run that goes on is the one that was begun: the config in its folder beside that of this start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = "config.yaml"
SECTIONS = ("seed_everything", "model", "data")  # a run's length, devices and callbacks may change
SHOWN = 3
LONGEST = 60
MAY_DIFFER = {
    # where data lie, how they are read, and what is evaluated on the way
    *(f"data.init_args.{name}" for name in ("root", "features", "num_workers", "bank", "stream", "token_cache")),
    *(f"data.init_args.{name}" for name in ("eval_batch_size", "limit_eval")),
    "model.init_args.compile_model",
    # by what they come to, see VLModule.on_load_checkpoint: null stands for a default
    *(f"model.init_args.{name}" for name in ("no_decay", "trainable")),
}


class OtherRun(ValueError):
    """A run's name belongs to a run of another config."""


def check_same(folder: Path, config: Mapping[str, Any], cure: str) -> None:
    """Refuse to go on with a run under another seed, model or data.

    Args:
        folder: Of the run.
        config: Of this start, resolved; a section that it lacks is not compared.
        cure: What to do instead.

    Raises:
        OtherRun: Names the first settings that differ.
    """
    try:
        theirs = yaml.safe_load((folder / FILE).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # a kill may have torn it
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
            # a class's settings are all written down: one on one side alone is of another version of the class
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
    """Whether two names may be of one file: the working directory may have been another, and a hub's name a folder."""
    if os.path.realpath(there) == os.path.realpath(here):
        return True
    one, other = Path(there), Path(here)
    if one.is_absolute() == other.is_absolute():
        # staged on a node's disk, now on another's
        return one.is_absolute() and one.name == other.name and not one.exists()
    whole, end = (one, other) if one.is_absolute() else (other, one)
    parts = Path(os.path.normpath(end)).parts
    return bool(parts) and whole.parts[-len(parts) :] == parts


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
