"""Paired bootstrap intervals, against plain computations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.reports.run_folders import make_record, write_run
from vlpet_lightning.metrics.caption import caption_scores
from vlpet_lightning.metrics.questions import caption_question_scores, caption_question_scores_of
from vlpet_lightning.reports.bootstrap import Bootstrap, resampled_means
from vlpet_lightning.reports.questions import Questions, read_questions
from vlpet_lightning.reports.runs import find_runs


def questions(task: str, scores: np.ndarray) -> Questions:
    return Questions(task, tuple(map(str, range(scores.shape[1]))), scores)


def test_resampled_means_are_those_of_the_drawn_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(1).normal(size=(3, 7))
    drawn = np.random.default_rng(5).integers(7, size=(20, 7))
    expected = scores[:, drawn].mean(axis=2).T
    assert np.allclose(resampled_means(scores, 20, np.random.default_rng(5)), expected)
    monkeypatch.setattr("vlpet_lightning.reports.bootstrap.CHUNK", 15)  # two resamples at a time
    assert np.allclose(resampled_means(scores, 20, np.random.default_rng(5)), expected)


def test_the_interval_over_questions_is_that_of_the_normal_theory() -> None:
    rng = np.random.default_rng(0)
    one = 100.0 * (rng.random((1, 2000)) < 0.7)
    other = np.where(rng.random((1, 2000)) < 0.8, one, 100 - one)  # agrees on 80 %: pairing narrows the interval
    interval = Bootstrap({"vqa": questions("vqa", np.vstack([one, other]))}, 4000).compare([0], [1], ["vqa"])
    differences = (one - other)[0]
    error = 1.96 * differences.std() / np.sqrt(2000)
    assert interval.difference == pytest.approx(differences.mean())
    assert interval.questions == pytest.approx((differences.mean() - error, differences.mean() + error), abs=0.25)
    assert interval.seeds is None
    unpaired = 1.96 * np.sqrt((one.var() + other.var()) / 2000)
    assert interval.questions[1] - interval.questions[0] < 1.8 * unpaired
    assert interval.excludes_zero == (interval.questions[0] > 0)


def test_seeds_widen_the_interval() -> None:
    """Runs that differ only between seeds: questions alone give a narrow interval around the means."""
    scores = np.repeat(np.array([[60.0], [62.0], [70.0], [61.0], [63.0], [71.0]]), 50, axis=1)
    interval = Bootstrap({"gqa": questions("gqa", scores)}, 2000).compare([0, 1, 2], [3, 4, 5], ["gqa"])
    assert interval.difference == pytest.approx(-1.0)
    assert interval.questions == pytest.approx((-1.0, -1.0))
    assert interval.seeds is not None
    assert interval.seeds[0] < -5
    assert interval.seeds[1] > 4
    assert not interval.excludes_zero


def test_an_average_of_tasks_is_that_of_their_differences() -> None:
    rng = np.random.default_rng(2)
    tasks = {name: questions(name, rng.normal(50, 10, size=(2, count))) for name, count in (("gqa", 90), ("vqa", 40))}
    found = Bootstrap(tasks, 500)
    parts = [found.compare([0], [1], [name]).difference for name in tasks]
    assert found.compare([0], [1], list(tasks)).difference == pytest.approx(np.mean(parts))


def test_equal_runs_have_no_difference_and_the_draws_are_reproducible() -> None:
    scores = np.random.default_rng(3).normal(size=(1, 30))
    both = {"vqa": questions("vqa", np.vstack([scores, scores]))}
    assert Bootstrap(both, 100).compare([0], [1], ["vqa"]).questions == (0.0, 0.0)
    other = {"vqa": questions("vqa", np.vstack([scores, scores[:, ::-1]]))}
    assert Bootstrap(other, 100).compare([0], [1], ["vqa"]) == Bootstrap(other, 100).compare([0], [1], ["vqa"])
    assert Bootstrap(other, 100, 1).compare([0], [1], ["vqa"]) != Bootstrap(other, 100).compare([0], [1], ["vqa"])


@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr2"])
def test_the_score_of_each_question_is_read_from_the_predictions(tmp_path: Path, task: str) -> None:
    right = [[True, False, True, True], [False, False, True, True]]
    for number, some in enumerate(right):
        write_run(tmp_path / str(number), record=make_record(seed=number), right={task: some})
    runs, _ = find_runs([tmp_path])
    found, reason = read_questions(runs, task)
    assert reason == ""
    assert found is not None
    assert found.scores.tolist() == [[100.0 * fine for fine in some] for some in right]


def test_the_score_of_a_caption_is_its_cider_within_the_split(tmp_path: Path) -> None:
    captions = {"1": "a red ball", "2": "two dogs run"}
    truths = {"1": ["a red ball on the grass", "a ball"], "2": ["two dogs run"]}
    cider = caption_scores(captions, truths, ["cider"])["cider"]
    run = write_run(tmp_path / "a", {"caption/cider": 100 * cider}, make_record(tasks=("caption",)))
    records = [
        {"question_id": id, "prediction": text, "reference": {"captions": truths[id]}} for id, text in captions.items()
    ]
    (run / "predictions").mkdir()
    (run / "predictions/test_caption.json").write_text(json.dumps({"predictions": records}))
    found, reason = read_questions(find_runs([tmp_path])[0], "caption")
    assert reason == ""
    assert found is not None
    assert found.scores.mean() == pytest.approx(100 * cider)
    assert found.scores[0, 0] != found.scores[0, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content["predictions"].pop(), "has 3 predictions, of other questions than"),
        (lambda content: content["predictions"][0].update(question_id="other"), "of other questions than"),
        (lambda content: content["predictions"][0].update(prediction="blue"), "score 50.00, the run logged 75.00"),
    ],
)
def test_predictions_that_do_not_fit_are_a_reason_and_not_an_error(tmp_path: Path, change, reason: str) -> None:
    for name in "ab":
        write_run(tmp_path / name, record=make_record(), right={"gqa": [True, False, True, True]})
    path = tmp_path / "b/predictions/test_gqa.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    found, said = read_questions(find_runs([tmp_path])[0], "gqa")
    assert found is None
    assert reason in said
    path.unlink()
    assert "there is no" in read_questions(find_runs([tmp_path])[0], "gqa")[1]


def test_answers_that_are_not_public_are_a_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "a", record=make_record(), right={"gqa": [True, False]})
    path = tmp_path / "a/predictions/test_gqa.json"
    content = json.loads(path.read_text())
    content["predictions"][0]["reference"] = None
    path.write_text(json.dumps(content))
    assert "without public answers" in read_questions(find_runs([tmp_path])[0], "gqa")[1]


def test_captions_of_several_runs_score_as_each_alone() -> None:
    references = [{"captions": ["a red ball on the grass", "a ball"]}, {"captions": ["two dogs run"]}, {"captions": []}]
    runs = [["a red ball", "two dogs", "x"], ["a dog", "two dogs run", ""], ["", "", ""]]
    assert caption_question_scores_of(runs, references) == [caption_question_scores(run, references) for run in runs]
    assert caption_question_scores_of(runs, references)[2] == [0.0, 0.0, None]
