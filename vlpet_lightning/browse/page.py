"""The page: data, style and script in one HTML file that loads nothing else and runs nothing from the data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from vlpet_lightning.browse.entries import TYPES, Entry, largest_score
from vlpet_lightning.protocol import differences
from vlpet_lightning.tasks import TASKS

# characters that could end a script element or confuse a JavaScript parser
ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def script_json(data: Any) -> str:
    """Encode data as JSON that can stand inside a script element.

    >>> script_json({"answer": "</script>"})
    '{"answer":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(ESCAPES)


def _file(name: str) -> str:
    return (files("vlpet_lightning.browse") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def differing_items(runs: Sequence[str], protocols: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return name and values of the protocol items in which two runs differ; none if neither has a protocol."""
    if not any(protocols):
        return []
    records = {run: protocol or None for run, protocol in zip(runs, protocols, strict=True)}
    return [[name, *(values[run] for run in runs)] for name, values in differences(records).items()]


def page(
    entries: Sequence[Entry],
    runs: Sequence[str],
    *,
    split: str,
    pictures: dict[str, str],
    keys: dict[tuple[str, str], str],
    problems: dict[str, str],
    side: int,
    protocols: Sequence[dict[str, Any]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the page.

    Args:
        entries: Questions, in the order of the page.
        runs: Names of the runs, all different.
        split: Name of the split.
        pictures: Data URLs by key.
        keys: Key of the picture of each (task, image id).
        problems: Reason by key, for pictures that could not be read.
        side: Pixels of the pictures' longest side.
        protocols: Protocol of each run.
        notes: Lines shown at the top.
    """
    names = list(pictures)
    place = {name: number for number, name in enumerate(names)}

    def shown(task: str, image: str) -> list[Any]:
        key = keys.get((task, image), "")
        return [image, place.get(key, -1), problems.get(key, "")]

    present = {entry.task for entry in entries}
    data = {
        "runs": list(runs),
        "split": split,
        "tasks": {task: {"largest": largest_score(task)} for task in TASKS if task in present},
        "pictures": [pictures[name] for name in names],
        "side": side,
        "notes": list(notes),
        "protocols": [protocol for protocol in protocols if protocol],
        "differences": differing_items(runs, protocols) if len(runs) == 2 else [],
        "entries": [
            {
                "task": entry.task,
                "id": entry.id,
                "text": entry.text,
                **{name: entry.types.get(name, "") for name in TYPES},
                "truth": entry.truth,
                "said": entry.said,
                "scores": [None if score is None else round(score, 4) for score in entry.scores],
                "images": [shown(entry.task, image) for image in entry.images],
            }
            for entry in entries
        ],
    }
    script, style = _file("page.js"), _file("page.css")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": escape(policy),
        "title": escape(f"{' and '.join(runs)}: {split} predictions"),
        "style": style,
        "data": script_json(data),
        "script": script,
    }
    # in one pass over the template: the data may contain a placeholder
    return re.sub(r"@@(\w+)@@", lambda match: parts[match[1]], _file("page.html"))
