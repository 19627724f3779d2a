"""The ``overlays`` key of a config file, which lists the configs it is based on.

A point of a sweep uses it to select a method by its file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

KEY = "overlays"
OPTION = "--config"
SPELT = re.compile(r"(?:--con?f?i?g?|-c)(=.*)?|-c(.+)", re.DOTALL)  # the spellings accepted by argparse


def with_overlays(args: Sequence[str] | None) -> list[str]:
    """Insert the overlays of each config file before it in a command line.

    Args:
        args: Arguments; None uses those of the program.

    Raises:
        FileNotFoundError: If an overlay does not exist.
        ValueError: If a config file is not a YAML mapping or is its own overlay, or if ``overlays`` is given on the
            command line or is not a list of names.
    """
    words = list(sys.argv[1:] if args is None else args)
    found: list[str] = []
    while words:
        word = words.pop(0)
        if word.partition("=")[0] == f"--{KEY}":
            raise ValueError(f"{KEY} is valid only in a config file: on the command line, repeat {OPTION}")
        spelt = SPELT.fullmatch(word)
        value = spelt and (spelt[1] or spelt[2])
        if spelt is None or not (value or words):
            found.append(word)
            continue
        path = value.removeprefix("=") if value else words.pop(0)
        for overlay in overlays_of(Path(path)):
            found += [OPTION, overlay]
        found += [OPTION, path]
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Read the settings in a config file.

    Raises:
        ValueError: If the file is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"config file {path} is not valid YAML ({where}{problem}): fix it, or give another") from error
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"{str(content)[:40]!r}"
        raise ValueError(f"config file {path} must be a mapping of settings by name, got {held}")
    return content


def overlays_of(path: Path, above: tuple[Path, ...] = ()) -> list[str]:
    """Return all overlays of a config file, lowest first.

    A missing config file has none; the parser reports it.
    """
    if path in above:
        raise ValueError(f"{path} is its own overlay: remove it from {KEY} in {above[-1]}")
    if not path.is_file():
        return []
    named = read_config(path).get(KEY)
    names = [named] if isinstance(named, str) else named or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{KEY} of {path} must be the name of a config file, or a list of names, got {named!r}")
    found: list[str] = []
    for name in names:
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"no config file {name}, listed in {KEY} of {path}: relative paths start from {Path.cwd()}"
            )
        found += [*overlays_of(Path(name), (*above, path)), name]
    return found
