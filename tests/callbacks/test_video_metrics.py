"""Scores and submission files of the video-text tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from callbacks import PredictionWriter, VideoMetrics
from tests.callbacks.evaluated import Fixed, batch, loader, trainer
from vlpet_lightning.batch import Batch

pytestmark = pytest.mark.filterwarnings("ignore:The .*_dataloader:UserWarning", "ignore:.*does not have many workers.*")

ANSWERS = {"1": "a1", "2": "a cat", "10": "a red bus", "11": "a red bus", "12": "stir the pan"}


def caption(text: str, clip: str) -> dict[str, Any]:
    return {"captions": [text], "clip_id": clip}


def batches() -> list[Batch]:
    return [
        batch("tvqa", ["1", "2"], [{"label": "a1", "choices": 5}, {"label": "a0", "choices": 5}]),
        batch("tvc", ["10", "11"], [caption("a red bus", "7"), caption("the bus is red", "7")]),
    ]


def test_accuracy_and_cider_are_logged_in_percent(tmp_path: Path) -> None:
    module = Fixed(ANSWERS)
    logged = trainer(tmp_path, VideoMetrics()).validate(module, loader(batches()), verbose=False)[0]
    assert module.scores["val/tvqa"] == {"accuracy": 50.0, "well_formed": 50.0}
    assert set(module.scores["val/tvc"]) == {"cider"}
    assert set(logged) == {"val/tvqa/accuracy", "val/tvqa/well_formed", "val/tvc/cider"}


def test_submissions_have_the_forms_of_the_benchmark(tmp_path: Path) -> None:
    """The formats of VALUE's sample predictions: ``{"30351": 2, ...}``, and one line per clip."""
    run = trainer(tmp_path, PredictionWriter(str(tmp_path)))
    run.test(Fixed(ANSWERS), loader([*batches(), batch("yc2c", ["12"], [])]), verbose=False)
    assert json.loads((tmp_path / "test_tvqa_submission.json").read_text()) == {"1": 1, "2": -1}
    lines = (tmp_path / "test_tvc_submission.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"video_id": "image10", "clip_id": 7, "descs": [{"desc": "a red bus"}]}
    ]
    assert json.loads((tmp_path / "test_yc2c_submission.jsonl").read_text())["clip_id"] == 12


def test_an_unknown_caption_metric_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="choose some of"):
        VideoMetrics(["cidre"])
