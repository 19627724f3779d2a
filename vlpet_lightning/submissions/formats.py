"""Result formats of the evaluation servers, one row per task in :data:`FORMATS`.

Sources: visualqa.org/evaluation.html (VQA), cs.stanford.edu/people/dorarad/gqa/evaluate.html (GQA), lil-lab/nlvr
nlvr2/eval/metrics.py (NLVR2), cocodataset.org/#format-results (COCO captions), VALUE-Leaderboard/EvaluationTools
README.md (TVQA, How2QA, TVC, YC2C).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlpet_lightning.prediction_files import Record

Answer = tuple[str, str]  # id as in our files, prediction
NO_CHOICE = -1  # written for a multiple-choice answer that names no choice


class SubmissionError(ValueError):
    """A result file that a server would refuse; names the file, the entry and the cure."""


def server_id(id: str) -> int | str:
    """Return an id as the server has it: a number if it is one.

    >>> server_id("262148000"), server_id("n12")
    (262148000, 'n12')
    """
    return int(id) if id.isdecimal() else id


def coco_image_id(image: str) -> int:
    """Return the number of a COCO image.

    Raises:
        SubmissionError: If the name ends in no number.

    >>> coco_image_id("COCO_val2014_000000391895")
    391895
    """
    digits = re.search(r"\d+$", image)
    if digits is None:
        raise SubmissionError(f"{image!r} is no COCO image, whose names end in their number: the server needs numbers")
    return int(digits[0])


# writing --------------------------------------------------------------------------------------------------------------


def _vqa(records: Sequence[Record]) -> str:
    other = next((r["question_id"] for r in records if not str(r["question_id"]).isdecimal()), None)
    if other is not None:
        raise SubmissionError(f"the question id {other!r} is no number: the server needs VQA's own ids")
    return json.dumps([{"question_id": int(r["question_id"]), "answer": r["prediction"]} for r in records])


def _gqa(records: Sequence[Record]) -> str:
    return json.dumps([{"questionId": str(r["question_id"]), "prediction": r["prediction"]} for r in records])


def _nlvr2(records: Sequence[Record]) -> str:
    names = [(record["reference"] or {}).get("identifier", record["question_id"]) for record in records]
    return "".join(f"{name},{r['prediction'].capitalize()}\n" for name, r in zip(names, records, strict=True))


def _caption(records: Sequence[Record]) -> str:
    return json.dumps([{"image_id": coco_image_id(r["question_id"]), "caption": r["prediction"]} for r in records])


def _choice(records: Sequence[Record]) -> str:
    named = [re.fullmatch(r"a(\d)", record["prediction"]) for record in records]
    return json.dumps({r["question_id"]: int(m[1]) if m else NO_CHOICE for r, m in zip(records, named, strict=True)})


def _clip(records: Sequence[Record]) -> str:
    clips: dict[str, Record] = {}
    for record in records:
        clip = str((record["reference"] or {}).get("clip_id", record["question_id"]))
        clips.setdefault(clip, record)
    return "".join(
        json.dumps({"video_id": r["images"][0], "clip_id": server_id(clip), "descs": [{"desc": r["prediction"]}]})
        + "\n"
        for clip, r in clips.items()
    )


# reading --------------------------------------------------------------------------------------------------------------


def _entries(content: bytes, fields: dict[str, tuple[type, ...]]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a JSON list of objects with the given fields."""
    found = json.loads(content)
    if not isinstance(found, list):
        raise SubmissionError(f"must be a JSON list, is {type(found).__name__}")
    exact = [(name, set(types)) for name, types in fields.items()]
    for number, entry in enumerate(found):
        if type(entry) is not dict:
            raise SubmissionError(f"entry {number} must be an object, is {str(entry)[:40]!r}")
        for name, types in exact:
            if type(entry.get(name)) not in types:
                _check_fields(entry, fields, f"entry {number}")
        yield entry


def _check_fields(entry: dict[str, Any], fields: dict[str, tuple[type, ...]], where: str) -> None:
    for name, types in fields.items():
        if name not in entry:
            raise SubmissionError(f"{where} has no {name!r}")
        if not isinstance(entry[name], types) or isinstance(entry[name], bool):
            kinds = " or ".join({"int": "a number", "str": "a string", "list": "a list"}[t.__name__] for t in types)
            raise SubmissionError(f"{where}: {name!r} must be {kinds}, is {entry[name]!r}")


def _read_vqa(content: bytes) -> Iterator[Answer]:
    for entry in _entries(content, {"question_id": (int,), "answer": (str,)}):
        yield str(entry["question_id"]), entry["answer"]


def _read_gqa(content: bytes) -> Iterator[Answer]:
    for entry in _entries(content, {"questionId": (str,), "prediction": (str,)}):
        yield entry["questionId"], entry["prediction"]


def _read_nlvr2(content: bytes) -> Iterator[Answer]:
    for number, line in enumerate(content.decode().splitlines(), start=1):
        if not line.strip():
            continue
        name, comma, value = (part.strip() for part in line.partition(","))
        if not comma or value.lower() not in ("true", "false"):
            raise SubmissionError(f"line {number} must read identifier,True or identifier,False, is {line[:60]!r}")
        yield name, value.lower()


def _read_caption(content: bytes) -> Iterator[Answer]:
    for entry in _entries(content, {"image_id": (int,), "caption": (str,)}):
        yield str(entry["image_id"]), entry["caption"]


class _Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object, whose keys may repeat."""


def _read_choice(content: bytes) -> Iterator[Answer]:
    found = json.loads(content, object_pairs_hook=_Pairs)
    if not isinstance(found, _Pairs):
        raise SubmissionError(f"must be a JSON object, is {type(found).__name__}")
    for id, choice in found:
        if not isinstance(choice, int) or isinstance(choice, bool):
            raise SubmissionError(f"the answer to {id!r} must be the number of a choice, is {choice!r}")
        yield id, f"a{choice}" if choice >= 0 else ""


def _read_clip(content: bytes) -> Iterator[Answer]:
    for number, line in enumerate(content.decode().splitlines(), start=1):
        if not line.strip():
            continue
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise SubmissionError(f"line {number} must be an object, is {line[:40]!r}")
        _check_fields(entry, {"clip_id": (int, str), "descs": (list,)}, f"line {number}")
        descriptions = entry["descs"]
        first = descriptions[0].get("desc") if descriptions and isinstance(descriptions[0], dict) else None
        if not isinstance(first, str):
            raise SubmissionError(f'line {number}: "descs" must hold {{"desc": TEXT}}, is {descriptions!r:.60}')
        yield str(entry["clip_id"]), first  # the server reads the first description only


@dataclass(frozen=True)
class Format:
    """Result format of one task.

    Args:
        suffix: Suffix of the file.
        write: Formats records of a prediction file.
        parse: Yields id and prediction of every entry; raises SubmissionError or a JSON error.
        key: Which id a server uses: ``question``, ``identifier`` (NLVR2), ``image`` (COCO) or ``clip``.
    """

    suffix: str
    write: Callable[[Sequence[Record]], str]
    parse: Callable[[bytes], Iterable[Answer]]
    key: str = "question"

    def read(self, content: bytes, name: str) -> list[Answer]:
        """Return id and prediction of every entry of a file, in order; ids may repeat.

        Args:
            content: Content of the file.
            name: Name of the file, for error messages.

        Raises:
            SubmissionError: If the content does not have this format.
        """
        try:
            return list(self.parse(content))
        except SubmissionError as error:
            raise SubmissionError(f"{name}: {error}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SubmissionError(
                f"{name} is not valid JSON ({error}): it may be cut short, write or copy it again"
            ) from error


FORMATS: dict[str, Format] = {
    "vqa": Format("json", _vqa, _read_vqa),
    "gqa": Format("json", _gqa, _read_gqa),
    "nlvr2": Format("csv", _nlvr2, _read_nlvr2, key="identifier"),
    "caption": Format("json", _caption, _read_caption, key="image"),
    "tvqa": Format("json", _choice, _read_choice),
    "how2qa": Format("json", _choice, _read_choice),
    "tvc": Format("jsonl", _clip, _read_clip, key="clip"),
    "yc2c": Format("jsonl", _clip, _read_clip, key="clip"),
}
