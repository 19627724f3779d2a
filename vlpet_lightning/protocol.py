"""The protocol of a run: what its numbers depend on besides the method, as plain data that is compared and printed.

A record is written to the run folder (``protocol.json``, ``protocol_test.json``), and logs, prediction files, exports
and reports carry it. The items of the protocols ``original``, ``corrected`` and ``vlm`` are explained in
docs/differences.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlpet_lightning.tasks import TASKS, VIDEO_TEXT

FORMAT = 1
NAMES = ("original", "corrected")
VLM = "vlm"  # protocol of decoder-only models
OWN_TEMPLATE = "that of the model"
CUSTOM = "custom"
UNKNOWN = "unknown"
WHOLE = "whole"  # part of a split that is scored
SHUFFLED = "features shuffled between images"
DIGITS = 12  # of a digest
SHOWN = 60  # characters of a value in messages
LAST, BEST = "last epoch", "best validation"
ABSENT = {"template": None}  # values of items that not every record has
DERIVED = {"format", "digest", "trained.digest", "trained.protocol"}  # differ because other items do
FILES = {"fit": "protocol.json"}  # other stages: protocol_STAGE.json
SHORTENED = {"sha256", "checksum"}

Record = Mapping[str, Any]
AS_CORRECTED = object()


@dataclass(frozen=True)
class Item:
    """One switch between the protocols.

    Args:
        title: Its name in docs/differences.md.
        setting: The setting in a config; empty if a run chooses by another way.
        original: Value in the protocol ``original``, or a function of value and tasks that recognises it.
        corrected: The same for ``corrected``.
        vlm: The same for ``vlm``; by default that of ``corrected``.
        trains: Whether only training depends on it.
    """

    title: str
    setting: str
    original: Any
    corrected: Any
    vlm: Any = AS_CORRECTED
    trains: bool = False

    def fits(self, protocol: str, value: Any, tasks: Sequence[str]) -> bool:
        """Whether a value is that of a protocol; None (not applicable) always is."""
        wanted = getattr(self, protocol)
        wanted = self.corrected if wanted is AS_CORRECTED else wanted
        return value is None or (wanted(value, tasks) if callable(wanted) else value == wanted)


def _prompts(gqa: str) -> Callable[[Any, Sequence[str]], bool]:
    """Recognise the tasks' prompts, with that of GQA; the original's scripts without task prompts have none at all."""

    def fits(value: Any, tasks: Sequence[str]) -> bool:
        wanted = {name: TASKS[name].prompt for name in tasks if name in TASKS}
        wanted |= {"gqa": gqa} if "gqa" in wanted else {}
        return isinstance(value, Mapping) and (dict(value) == wanted or not any(value.values()))

    return fits


def _instructions(value: Any, tasks: Sequence[str]) -> bool:
    wanted = {name: TASKS[name].instruction for name in tasks if name in TASKS}
    return isinstance(value, Mapping) and dict(value) == wanted


def usual_checkpoint(tasks: Sequence[str]) -> str:
    """Return which checkpoint the original tests: the last epoch, for videos the best on validation."""
    return BEST if set(tasks) & set(VIDEO_TEXT) else LAST


def _selected(value: Any, tasks: Sequence[str]) -> bool:
    return value == usual_checkpoint(tasks)


PRECISIONS = ("bf16-mixed", "32-true")  # of the protocol vlm
ITEMS: dict[str, Item] = {
    "prompts": Item("task prompts", "data.prompts", _prompts("gpa: "), _prompts("gqa: "), vlm=_instructions),
    "template": Item("prompt template", "model.template", None, None, vlm=OWN_TEMPLATE),
    "mask_padding": Item("small gate", "model.mask_padding", False, True, vlm=False),
    "mask_frames": Item("zero padding of short clips", "data.mask_frames", False, True),
    "truncate": Item("inputs longer than 600 tokens", "data.truncate", "end", "subtitles"),
    "answer_draw": Item("sampled answer for VQA, GQA", "data.answer_draw", "original", "seeded", trains=True),
    "seeded_order": Item("order of samples and tasks", "data.seeded_order", False, True, trains=True),
    "no_decay": Item(
        "weight decay", "model.no_decay", ["bias"], ["bias", "gate", "norm", "prompt", "vector"], trains=True
    ),
    "start": Item("initialisation", "model.start", "original", "identity", trains=True),
    "precision": Item(
        "precision", "trainer.precision", "32-true", "bf16-mixed", vlm=lambda value, tasks: value in PRECISIONS
    ),
    "caption_items": Item("video captions", "data.caption_items", "description", "clip"),
    "selected": Item("model selected", "", _selected, _selected),
}


def departures(items: Mapping[str, Any], tasks: Sequence[str], protocol: str) -> list[str]:
    """Name the items whose values differ from those of a protocol."""
    found = []
    for name, item in ITEMS.items():
        value = items.get(name, ABSENT.get(name, UNKNOWN))
        if not item.fits(protocol, value, tasks):
            found.append(f"{name}: {short(value)}")
    return found


def name_of(items: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """Return ``original``, ``corrected`` or ``custom``; of a decoder-only model ``vlm`` or ``custom``.

    Args:
        items: Value of each of :data:`ITEMS`; None where it does not apply to the run.
        tasks: Tasks of the run.
    """
    return next((name for name in candidates(items) if not departures(items, tasks, name)), CUSTOM)


def candidates(items: Mapping[str, Any]) -> Sequence[str]:
    """Return the protocols that a run may follow: those of encoder-decoders, or that of decoder-only models."""
    return NAMES if items.get("template") is None else (VLM,)


def merged_items(trained: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Combine the items of a training and of the evaluation of its checkpoint.

    An item on which the two differ is ``A in training, B here``, which belongs to no protocol.
    """
    found = dict(now)
    for name, item in ITEMS.items():
        there, here = trained.get(name), now.get(name)
        if there is None:
            continue
        if item.trains:
            found[name] = there
        elif here is not None and not _agree(there, here):
            found[name] = f"{short(there)} in training, {short(here)} here"
    return found


def _agree(there: Any, here: Any) -> bool:
    """Whether values are equal; prompts are compared for the tasks of both, as some of the tasks may be evaluated."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return all(there[task] == here[task] for task in there.keys() & here.keys())
    return there == here


def title_of(record: Record) -> str:
    """Return the name of a record's protocol, with what makes a custom one differ from its nearest."""
    if record.get("protocol") != CUSTOM:
        return str(record.get("protocol", UNKNOWN))
    items, tasks = record.get("items", {}), record.get("tasks", [])
    nearest = min(candidates(items), key=lambda name: len(departures(items, tasks, name)))
    return f"{CUSTOM} ({nearest} except {', '.join(departures(items, tasks, nearest))})"


# files ---------------------------------------------------------------------------------------------------------------


def digest(record: Record) -> str:
    """Return a short name of a record, the same for equal records."""
    content = {key: value for key, value in record.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def file_of(stage: str) -> str:
    """Return the name of the record's file in a run folder: of ``fit``, ``validate``, ``test`` or ``predict``."""
    return FILES.get(stage, f"protocol_{stage}.json")


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record in a file; None if there is no file, or it holds no record."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def records_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return all records of a run folder by digest, including those that a later start has replaced."""
    found = (read_record(path) for path in sorted(folder.glob("protocol*.json")))
    return {record["digest"]: record for record in found if record is not None and "digest" in record}


# comparison ----------------------------------------------------------------------------------------------------------


def short(value: Any) -> str:
    """Format a value for a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted name."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and name.rpartition(".")[2] in SHORTENED:
        yield name, value[:DIGITS]
    else:
        yield name, value


def differences(records: Mapping[str, Record | None]) -> dict[str, dict[str, str]]:
    """Find the items in which runs differ.

    Args:
        records: Record of each run; None for a run without one, whose items are unknown.

    Returns:
        The value of every run, for each item on which not all agree. A run without a record makes one more item,
        ``record``.
    """
    flat = {run: dict(flattened(record)) for run, record in records.items() if record is not None}
    found: dict[str, dict[str, str]] = {}
    if flat.keys() != records.keys():
        found["record"] = {run: records[run]["digest"] if run in flat else UNKNOWN for run in records}  # type: ignore[index]
    for name in dict.fromkeys(name for values in flat.values() for name in values if name not in DERIVED):
        values = {run: record.get(name, "none") for run, record in flat.items()}
        if len({json.dumps(value, default=str) for value in values.values()}) > 1:
            shown = {run: short(values[run]) if run in flat else UNKNOWN for run in records}
            if found.get(name.removeprefix("trained.")) != shown:  # not once more for the training of a checkpoint
                found[name] = shown
    return found


# in words ------------------------------------------------------------------------------------------------------------


def scale_of(metric: str) -> str:
    """Return the scale of a score: ``percent``, or ``x 100`` for a caption metric."""
    captions = metric.startswith(("cider", "bleu", "rouge", "meteor"))
    return "x 100" if captions else "percent"


def split_of(record: Record | None, stage: str, task: str) -> str:
    """Return the split of a task's scores, with the part of it that was scored and whether images were shuffled."""
    if record is None:
        return stage
    part = record.get("splits", {}).get(stage, {}).get(task, {}).get("part", WHOLE)
    shuffled = [SHUFFLED] if record.get("inputs", {}).get("shuffle_features") else []
    return ", ".join([stage, *([] if part == WHOLE else [part]), *shuffled])


def _annotations(tasks: Mapping[str, Any]) -> str:
    files = {name: value for found in tasks.values() for name, value in (found.get("annotations") or {}).items()}
    return "; ".join(f"{name} {value[:DIGITS]}" for name, value in sorted(files.items()))


def _stores(tasks: Mapping[str, Any]) -> str:
    stores = {store["name"]: store for found in tasks.values() if (store := found.get("store"))}
    return "; ".join(
        f"{name} {str(store.get('checksum'))[:DIGITS]} ({extractor_of(store)})" for name, store in stores.items()
    )


def extractor_of(store: Mapping[str, Any]) -> str:
    """Return the extractor of a feature store in words."""
    made = store.get("extractor") or {}
    return " ".join(str(made[key]) for key in ("model", "pretrained", "tree") if made.get(key)) or "unknown extractor"


def summary(record: Record) -> list[tuple[str, str]]:
    """Return the main facts of a record as pairs of name and value, for a table."""
    rows = [
        ("protocol", title_of(record)),
        ("record", str(record.get("digest", ""))),
        ("seed", str(record.get("seed"))),
    ]
    for stage, tasks in record.get("splits", {}).items():
        parts: dict[str, list[str]] = {}
        for name in tasks:
            parts.setdefault(split_of(record, stage, name), []).append(name)
        rows.append((f"{stage} split", "; ".join(f"{part}: {' '.join(names)}" for part, names in parts.items())))
        rows += [(f"{stage} annotations", _annotations(tasks)), (f"{stage} features", _stores(tasks))]
    decoding = record.get("generation", {})
    rows.append(("decoding", ", ".join(f"{task}: {in_words(how)}" for task, how in decoding.items())))
    rows.append(("scale", ", ".join(f"{task}: {scale}" for task, scale in record.get("scale", {}).items())))
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items())))
    return [(name, value) for name, value in rows if value]


def in_words(decoding: Any) -> str:
    """Format the decoding settings of a task."""
    if not isinstance(decoding, Mapping):
        return str(decoding)
    beams = decoding["beams"]
    return f"{'greedy' if beams == 1 else f'{beams} beams'}, at most {decoding['max_length']} tokens"
