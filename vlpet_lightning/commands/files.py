"""Files on the command line: configs by path, or by name in a folder of ``experiments``, and output files."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

EXPERIMENTS = Path("experiments")
CHECKOUT = Path(__file__).parents[2]
BASE = "image_text"  # the experiment that overlays are for, unless another is given


def find_config(name: str, folders: Sequence[str] = ("",)) -> Path:
    """Return the path of a config file.

    Args:
        name: A path, or the name of a file without its ending.
        folders: Folders of ``experiments`` to search, first in the working directory, then in this checkout.

    Raises:
        FileNotFoundError: If there is no such file; the message lists names.
    """
    if Path(name).is_file():
        return Path(name)
    known: dict[str, None] = {}
    for root in (EXPERIMENTS, CHECKOUT / EXPERIMENTS):
        for folder in folders:
            path = root / folder / f"{name}.yaml"
            if path.is_file():
                return path
            known |= dict.fromkeys(sorted(file.stem for file in path.parent.glob("*.yaml")))
    near = get_close_matches(name, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(f"no config {name!r}: {guess}give a path, or a name of {', '.join(known)}")


def as_words(configs: Sequence[Path]) -> list[str]:
    """Return config files as arguments of ``fit``."""
    return [word for path in configs for word in ("--config", str(path))]


def check_out(path: Path, overwrite: bool) -> None:
    """Check that a file can be written.

    Raises:
        FileExistsError: If it exists and is not to be replaced, or is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        cure = "give a file" if path.is_dir() else "give another name, or --overwrite"
        raise FileExistsError(f"--out {path} exists: {cure}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} for --out {path}: create it, or give another")
