"""Scores of a task as its official scorer computes them, with its breakdowns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from data_modules.scoring.answers import ScoringError
from data_modules.scoring.truths import Reference
from vlpet_lightning.metrics import exact_match, multiple_choice_scores, nlvr2_scores
from vlpet_lightning.metrics.caption import DEFAULT, caption_scores
from vlpet_lightning.metrics.gqa import gqa_report
from vlpet_lightning.metrics.groups import GroupScore, group_scores, mean
from vlpet_lightning.metrics.vqa import vqa_accuracies, vqa_soft_score

Groups = dict[str, dict[str, GroupScore]]
STEP = 5_000  # questions between two updates of a progress bar
Advance = Callable[[int], None]  # called with a number of scored questions


@dataclass
class Scores:
    """Scores of one task, from 0 to 1 (CIDEr may exceed 1).

    Args:
        scores: Main scores by name.
        groups: Kind of group to scores by group.
        notes: What was left out, and why.
    """

    scores: dict[str, float] = field(default_factory=dict)
    groups: Groups = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """Choices of a scoring.

    Args:
        metrics: Caption metrics.
        caption_items: ``clip``: each clip once, with all its descriptions, as VALUE's scorer does; ``description``:
            each description once with itself as its only reference, as the VL-PET repository does.
        choices: Contents of GQA's choices file, for validity and plausibility.
    """

    metrics: Sequence[str] = DEFAULT
    caption_items: str = "clip"
    choices: Mapping[str, Mapping[str, list[str]]] | None = None


def _vqa(said: dict[str, str], truths: dict[str, Reference], options: Options, advance: Advance) -> Scores:
    first = next(iter(truths.values()))
    found = Scores()
    if "answers" in first:
        official, original = [], []
        for id, text in said.items():
            ours, theirs = vqa_accuracies(text, truths[id]["answers"])
            official.append(ours)
            original.append(theirs)
            if len(official) % STEP == 0:
                advance(STEP)
        found.scores = {"accuracy": mean(official), "accuracy_original": mean(original)}
        for name in ("answer_type", "question_type"):
            groups = group_scores(official, [truths[id].get(name) for id in said])
            if groups:
                found.groups[name.replace("_", " ")] = groups
    else:
        found.notes.append("accuracy left out: it needs the official annotations, which have the ten human answers")
    if "label" in first:
        found.scores["soft_score"] = mean([vqa_soft_score(text, truths[id]["label"]) for id, text in said.items()])
    return found


def _gqa(said: dict[str, str], truths: dict[str, Reference], options: Options, advance: Advance) -> Scores:
    if "label" in next(iter(truths.values())):
        right = [exact_match(text, truths[id]["label"]) for id, text in said.items()]
        note = "types, consistency, validity and plausibility left out: they need GQA's official question files"
        return Scores({"accuracy": mean(right)}, notes=[note])
    report = gqa_report(said, {id: truths[id] for id in said}, options.choices)
    notes = []
    if "consistency" not in report.scores:
        notes.append("consistency left out: it needs answers to all entailed questions (the file of all questions)")
    if options.choices is None:
        notes.append("validity and plausibility left out: they need the choices file (--choices)")
    return Scores(report.scores, report.groups, notes)


def _nlvr2(said: dict[str, str], truths: dict[str, Reference], options: Options, advance: Advance) -> Scores:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = [truths[id]["label"] for id in said]
        scores = nlvr2_scores(list(said.values()), labels, list(said))
    return Scores(scores, notes=[str(warning.message) for warning in caught])


def _choice(said: dict[str, str], truths: dict[str, Reference], options: Options, advance: Advance) -> Scores:
    answers, choices = ([truths[id][name] for id in said] for name in ("label", "choices"))
    scores = multiple_choice_scores(list(said.values()), answers, choices)
    right = [float(text == answer) for text, answer in zip(said.values(), answers, strict=True)]
    groups = {
        "show": group_scores(right, [truths[id]["show"] for id in said]),
        "position of the right answer": group_scores(right, answers),
    }
    return Scores(scores, {name: group for name, group in groups.items() if group})


def _ascii(text: str) -> str:
    """Replace characters outside ASCII by spaces, as VALUE's scorer does (evaluate_tvc.py, remove_nonascii)."""
    return "".join(character if ord(character) < 128 else " " for character in text)


def _captions(said: dict[str, str], truths: dict[str, Reference], options: Options, advance: Advance) -> Scores:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        references = {id: truths[id]["captions"] for id in said}
        scores = caption_scores(said, references, options.metrics, done=lambda metric: advance(len(said)))
    return Scores(scores, notes=[str(warning.message) for warning in caught])


def _clips(said: dict[str, str], truths: dict[str, Reference], options: Options, advance: Advance) -> Scores:
    if options.caption_items == "clip":
        plain = {id: {"captions": [_ascii(text) for text in truths[id]["captions"]]} for id in said}
        return _captions({id: _ascii(text) for id, text in said.items()}, plain, options, advance)
    items = {(id, key): text for id in said for key, text in truths[id]["descriptions"].items()}
    names = {item: " ".join(item) for item in items}
    return _captions(
        {names[item]: said[item[0]] for item in items},
        {names[item]: {"captions": [text]} for item, text in items.items()},
        options,
        advance,
    )


SCORERS: dict[str, Callable[[dict[str, str], dict[str, Reference], Options, Advance], Scores]] = {
    "vqa": _vqa,
    "gqa": _gqa,
    "nlvr2": _nlvr2,
    "caption": _captions,
    "tvqa": _choice,
    "how2qa": _choice,
    "tvc": _clips,
    "yc2c": _clips,
}


def score_task(
    task: str,
    predictions: dict[str, str],
    references: dict[str, Reference],
    options: Options = Options(),  # immutable
    advance: Advance = lambda count: None,
) -> Scores:
    """Score the predictions of a task.

    Args:
        task: Name of a task.
        predictions: Prediction of each question.
        references: Reference of each question, as :func:`~data_modules.scoring.truths.read_truths` returns them.
        options: Choices of the scoring.
        advance: Called as questions are scored, for a progress bar.

    Raises:
        ScoringError: If there is no prediction, or a question has no reference.
    """
    lacking = predictions.keys() - references.keys()
    if not predictions or lacking:
        raise ScoringError(f"{task}: {len(lacking)} of {len(predictions)} predictions have no reference")
    return SCORERS[task](predictions, references, options, advance)
