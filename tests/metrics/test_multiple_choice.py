"""Multiple-choice accuracy and captions of clips, on the benchmark's own sample predictions."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from vlpet_lightning.metrics import CaptionScores, MultipleChoice, multiple_choice_scores
from vlpet_lightning.metrics.java import TOKENIZER_JAR, java_path

VALUE = Path(__file__).parents[3] / "shared" / "value"
with_value_files = pytest.mark.skipif(not VALUE.is_dir(), reason="the benchmark's files are not at ../shared/value")


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (VALUE / name).read_text().splitlines()]


def test_only_the_choice_itself_is_right() -> None:
    predictions = ["a1", " a1", "A1", "a1.", "a4", ""]
    scores = multiple_choice_scores(predictions, ["a1"] * 6, [4] * 6)
    assert scores == {"accuracy": 1 / 6, "well_formed": 1 / 6}  # there is no a4 among four choices


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no question to score"):
        multiple_choice_scores([], [], [])


def test_a_question_that_comes_twice_counts_once() -> None:
    metric = MultipleChoice()
    metric.update(["1", "2", "2"], ["a0", "a3", "a3"], [{"label": f"a{i}", "choices": 5} for i in (0, 1, 1)])
    assert metric.compute() == {"accuracy": 0.5, "well_formed": 1.0}


@with_value_files
def test_how2qas_sample_predictions_score_as_counted_by_hand() -> None:
    truths = {str(record["qid"]): record["answer_idx"] for record in lines("how2qa_val_release.jsonl")}
    said = json.loads((VALUE / "how2qa_val_predictions.json").read_text())
    metric = MultipleChoice()
    references = [{"label": f"a{truths[id]}", "choices": 4} for id in said]
    metric.update(list(said), [f"a{choice}" for choice in said.values()], references)
    right = sum(truths[id] == choice for id, choice in said.items())
    assert metric.compute() == {"accuracy": right / 3115, "well_formed": 1.0}
    assert right == 2278


@with_value_files
def test_yc2cs_sample_predictions_score_as_pycocoevalcap_scores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.access(TOKENIZER_JAR.parent, os.W_OK):
        pytest.skip("pycocoevalcap writes into its own folder, which is read-only here")
    monkeypatch.setenv("PATH", str(Path(java_path()).parent), prepend=os.pathsep)
    said = {str(record["clip_id"]): record["descs"][0]["desc"] for record in lines("yc2c_val_predictions.jsonl")}
    truths = {
        str(r["clip_id"]): [entry["desc"] for entry in r["descs"]]
        for r in lines("yc2c_val_release.jsonl")
        if str(r["clip_id"]) in said
    }
    metric = CaptionScores(["cider"])
    metric.update(list(said), list(said.values()), [{"captions": truths[id]} for id in said])
    theirs, hypotheses = (
        PTBTokenizer().tokenize({id: [{"caption": text} for text in texts[id]] for id in sorted(said)})
        for texts in (truths, {id: [text] for id, text in said.items()})
    )
    expected = Cider().compute_score(theirs, hypotheses)[0]
    assert len(said) == 3492
    assert metric.compute()["cider"] == pytest.approx(expected, rel=1e-12)
