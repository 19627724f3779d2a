"""``overlays`` in a config file: files that it is laid over, so that a sweep's point can name a method by its file."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

KEY = "overlays"
OPTION = "--config"
SPELT = re.compile(r"(?:--con?f?i?g?|-c)(=.*)?|-c(.+)", re.DOTALL)  # short, joined or cut, as argparse takes it


def with_overlays(args: Sequence[str] | None) -> list[str]:
    """A command line in which the overlays of each config file come before it.

    Args:
        args: Words; None takes the program's.

    Raises:
        FileNotFoundError: If an overlay is not there.
        ValueError: If a config file is no YAML with settings by name, or is laid over itself, or if ``overlays`` is on
            the command line, or no list of names.
    """
    words = list(sys.argv[1:] if args is None else args)
    found: list[str] = []
    while words:
        word = words.pop(0)
        if word.partition("=")[0] == f"--{KEY}":
            raise ValueError(f"{KEY} belongs into a config file: on the command line give {OPTION} several times")
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
    """The settings in a config file.

    Raises:
        ValueError: If it is no YAML, or holds no settings by name.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"config file {path} is no YAML ({where}{problem}): mend it, or give another") from error
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"{str(content)[:40]!r}"
        raise ValueError(f"config file {path} must hold settings by name, it holds {held}")
    return content


def overlays_of(path: Path, above: tuple[Path, ...] = ()) -> list[str]:
    """The files that a config file is laid over, lowest first; none where it is not there: the parser says so."""
    if path in above:
        raise ValueError(f"{path} is laid over itself: take it out of {KEY} in {above[-1]}")
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
                f"no config file {name}, which {KEY} of {path} names: it is looked for in {Path.cwd()}"
            )
        found += [*overlays_of(Path(name), (*above, path)), name]
    return found
