"""Diagnosis of damaged backbone files; the errors of the libraries that read them do not name the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
JSON = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    f"{WEIGHTS}.index.json",
)
CURE = "copy it again from its source, or make the backbone again"


def first_line(error: Exception) -> str:
    """Return the type and first line of a library's error, to append to our message in brackets."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


def damaged_settings(folder: Path) -> Iterator[str]:
    """Yield a message for each invalid JSON file of a folder."""
    for path in (folder / name for name in JSON):
        try:
            content = json.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            yield f"{path} is not valid JSON ({first_line(error)}): {CURE}"
        else:
            if not isinstance(content, dict):
                yield f"{path} must hold a JSON object, got {str(content)[:40]!r}: {CURE}"


def damaged_weights(folder: Path) -> Iterator[str]:
    """Yield a message for each truncated or invalid safetensors file of a folder, without reading tensors."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{path} is damaged or cut short ({first_line(error)}): {CURE}"


def unreadable(name_or_path: str, what: str, file: str, error: Exception) -> FileNotFoundError | ValueError:
    """Return the error to raise if a part of a backbone cannot be read.

    Args:
        name_or_path: Folder or Hub name of the backbone.
        what: Name of the part in the message.
        file: File that contains the part, in a folder.
        error: The library's error.

    Returns:
        An error that names the damaged file, or else the folder that lacks it or the command that downloads it.
    """
    folder = Path(name_or_path)
    for problem in (*damaged_settings(folder), *damaged_weights(folder)):
        return ValueError(problem)
    if (folder / file).is_file():
        return ValueError(f"{folder / file} cannot be read ({first_line(error)}): {CURE}")
    local = folder.is_dir() or folder.is_absolute() or name_or_path.startswith((".", "~")) or len(folder.parts) > 2
    cure = "" if local else f", or run `hf download {name_or_path}` once on a machine that reaches the hub"
    return FileNotFoundError(f"no {what} at {name_or_path!r}: give a folder with {file}{cure} ({first_line(error)})")
