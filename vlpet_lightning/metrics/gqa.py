"""Metrics of the GQA evaluation (eval.py of version 1.1, nlp.stanford.edu/data/gqa/eval.zip).

Accuracy is an exact match without normalisation, over the balanced questions. The other metrics need fields of the
official question files, or the choices file, and are left out where those are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlpet_lightning.metrics.groups import GroupScore, group_scores, mean

# eval.py, `belongs`: for questions about a common attribute, the valid answers are these names instead of the choices
COMMON = ("color", "material", "shape")
# eval.py, getStepsNum: operations that do not count as a reasoning step
FREE_STEPS = ("exist", "query: name", "choose name")


@dataclass
class GQAReport:
    """Scores from 0 to 1, except for ``distribution`` (a chi-square statistic divided by 100; lower is better).

    Args:
        scores: ``accuracy``, ``binary``, ``open``, ``consistency``, ``validity``, ``plausibility``, ``distribution``.
        groups: Scores by structural type, semantic type, number of reasoning steps and number of words.
    """

    scores: dict[str, float] = field(default_factory=dict)
    groups: dict[str, dict[str, GroupScore]] = field(default_factory=dict)


def reasoning_steps(question: Mapping[str, Any]) -> int:
    """Return the number of reasoning steps of a question's functional program."""
    steps = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(free in step for free in FREE_STEPS) for step in steps)


def _share_in_choices(
    predictions: Mapping[str, str],
    questions: Mapping[str, Mapping[str, Any]],
    choices: Mapping[str, Mapping[str, list[str]]],
    kind: str,
) -> float:
    def allowed(id: str) -> Any:
        return COMMON if "Common" in questions[id]["types"].get("detailed", "") else choices[id][kind]

    return mean([float(predictions[id] in allowed(id)) for id in questions])


def _consistency(
    predictions: Mapping[str, str], balanced: Mapping[str, Mapping[str, Any]], every: Mapping[str, Mapping[str, Any]]
) -> float | None:
    """Return the mean accuracy on the questions entailed by each question that was answered correctly."""
    scores = []
    for id, question in balanced.items():
        entailed = [other for other in question["entailed"] if other != id]
        if predictions[id] == question["answer"] and entailed:
            if any(other not in every or other not in predictions for other in entailed):
                return None
            scores.append(mean([float(predictions[other] == every[other]["answer"]) for other in entailed]))
    return mean(scores) if scores else None


def _distribution(predictions: Mapping[str, str], balanced: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the mean chi-square distance between true and predicted answers of each group of questions, over 100."""
    gold: dict[str, dict[str, int]] = {}
    said: dict[str, dict[str, int]] = {}
    for id, question in balanced.items():
        group = question["groups"]["global"]
        if group is not None:
            for counts, answer in ((gold, question["answer"]), (said, predictions[id])):
                counts.setdefault(group, {})
                counts[group][answer] = counts[group].get(answer, 0) + 1
    total = sum(sum(counts.values()) for counts in gold.values())
    if not total:
        return None
    weighted = sum(
        sum((said[group].get(answer, 0) - count) ** 2 / count for answer, count in counts.items())
        * sum(counts.values())
        for group, counts in gold.items()
    )
    return weighted / total / 100


def gqa_report(
    predictions: Mapping[str, str],
    questions: Mapping[str, Mapping[str, Any]],
    choices: Mapping[str, Mapping[str, list[str]]] | None = None,
) -> GQAReport:
    """Compute the metrics of the GQA evaluation.

    Args:
        predictions: Answer to each question; those to questions that are not balanced serve consistency only.
        questions: Questions of the official file by id, with ``answer`` and, depending on the metric, ``isBalanced``,
            ``types``, ``semantic``, ``entailed``, ``groups`` and ``question``.
        choices: Contents of the choices file: ``valid`` and ``plausible`` answers of each question.

    Raises:
        ValueError: If no question is balanced.
    """
    balanced = {id: question for id, question in questions.items() if question.get("isBalanced", True)}
    if not balanced:
        raise ValueError("no balanced question to score: accuracy is defined over the balanced questions")
    right = {id: float(predictions[id] == question["answer"]) for id, question in balanced.items()}
    report = GQAReport({"accuracy": mean(list(right.values()))})
    first = next(iter(balanced.values()))
    if "types" in first:
        structural = [question["types"]["structural"] for question in balanced.values()]
        semantic = [question["types"]["semantic"] for question in balanced.values()]
        answer_kinds = group_scores(right.values(), ["open" if kind == "query" else "binary" for kind in structural])
        report.scores |= {name: group.score for name, group in answer_kinds.items()}
        report.groups["structural type"] = group_scores(right.values(), structural)
        report.groups["semantic type"] = group_scores(right.values(), semantic)
    if "semantic" in first:
        steps = [f"{reasoning_steps(question):2d}" for question in balanced.values()]
        report.groups["reasoning steps"] = group_scores(right.values(), steps)
    if "question" in first:
        words = [f"{len(question['question'].split()):2d}" for question in balanced.values()]
        report.groups["words"] = group_scores(right.values(), words)
    optional = {
        "consistency": _consistency(predictions, balanced, questions) if "entailed" in first else None,
        "distribution": _distribution(predictions, balanced) if "groups" in first else None,
    }
    if choices is not None:
        optional["validity"] = _share_in_choices(predictions, balanced, choices, "valid")
        optional["plausibility"] = _share_in_choices(predictions, balanced, choices, "plausible")
    report.scores |= {name: score for name, score in optional.items() if score is not None}
    return report
