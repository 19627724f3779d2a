"""Evaluation servers: what they accept, and how often.

Sources: visualqa.org/challenge.html (2021), cs.stanford.edu/people/dorarad/gqa, lil.nlp.cornell.edu/nlvr,
cocodataset.org (guidelines, upload), VALUE-Leaderboard/EvaluationTools README.md and sample submissions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

VALUE_TASKS = ("tvqa", "how2qa", "tvc", "yc2c")


@dataclass(frozen=True)
class Server:
    """Evaluation server of one task.

    Args:
        name: Name and host.
        splits: Number of questions of each split that it evaluates; None if it is not known here.
        limits: Its limits on submissions, in one sentence.
        archive: Names of the files in a zip archive, by split, if it wants one; ``{name}`` stands for the method's.
    """

    name: str
    splits: dict[str, int | None]
    limits: str
    archive: dict[str, str] = field(default_factory=dict)


_VALUE = "CodaLab; one zip archive with a folder per task and both splits of each task"

SERVERS: dict[str, Server] = {
    "vqa": Server(
        "VQA v2 on EvalAI",
        {"test2015": 447_793, "test-dev2015": 107_394},
        "test-dev: 10 submissions a day; test-standard: 1 a day and 5 in all",
    ),
    "gqa": Server(
        "GQA on EvalAI",
        {"submission_all_questions": None},
        "answers to all questions of submission_all_questions.json, whichever split is evaluated",
    ),
    "nlvr2": Server(
        "none: all labels of NLVR2 are public since August 2022, use `score`",
        {"dev": 6_982, "test1": 6_967},
        "none",
    ),
    "caption": Server(
        "COCO captions on CodaLab",
        {"test2014": 40_775, "val2014": 40_504},
        "one zip archive with captions of both val2014 and test2014",
        {"val2014": "captions_val2014_{name}_results.json", "test2014": "captions_test2014_{name}_results.json"},
    ),
    "tvqa": Server(
        "VALUE",
        {"val": 15_253, "test": None},
        _VALUE,
        {"val": "tvqa/tvqa_val_predictions.json", "test": "tvqa/tvqa_test_predictions.json"},
    ),
    "how2qa": Server(
        "VALUE",
        {"val": 3_115, "test_public": 3_094},
        _VALUE,
        {"val": "how2qa/how2qa_val_predictions.json", "test_public": "how2qa/how2qa_test_public_predictions.json"},
    ),
    "tvc": Server(
        "VALUE",
        {"val": 10_841, "test": None},
        _VALUE,
        {"val": "tvc/tvc_val_predictions.jsonl", "test": "tvc/tvc_test_predictions.jsonl"},
    ),
    "yc2c": Server(
        "VALUE",
        {"val": 3_492, "test": 1_604},
        _VALUE,
        {"val": "yc2c/yc2c_val_predictions.jsonl", "test": "yc2c/yc2c_test_predictions.jsonl"},
    ),
}
