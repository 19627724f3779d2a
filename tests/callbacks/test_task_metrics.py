"""Scores logged by the metric callbacks."""

from pathlib import Path
from typing import Any

import pytest

from callbacks.caption_metrics import CaptionMetrics
from callbacks.predictions import PredictionWriter
from callbacks.vqa_metrics import VQAMetrics
from tests.callbacks.evaluated import Fixed, batch, loader, trainer, vqa
from vlpet_lightning.batch import Batch

pytestmark = pytest.mark.filterwarnings("ignore:The .*_dataloader:UserWarning", "ignore:.*does not have many workers.*")

ANSWERS = {"1": "dog", "2": "The cat", "3": "left", "4": "true", "5": "false", "6": "a red bus"}


def batches() -> list[Batch]:
    return [
        batch("vqa", ["1"], [vqa("dog")]),
        batch("vqa", ["2"], [vqa("cat", "a dog")]),
        batch("gqa", ["3"], [{"label": {"right": 1.0}}]),
        batch(
            "nlvr2",
            ["4", "5"],
            [{"label": "true", "identifier": "dev-1-0-0"}, {"label": "true", "identifier": "dev-1-1-0"}],
        ),
    ]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_scores_are_logged_in_percent_under_stage_and_task(stage: str, tmp_path: Path) -> None:
    module = Fixed(ANSWERS)
    run = trainer(tmp_path, VQAMetrics())
    logged = (run.validate if stage == "val" else run.test)(module, loader(batches()), verbose=False)[0]
    expected = {
        f"{stage}/vqa": {"accuracy": 100.0, "accuracy_original": 100.0, "soft_score": 50.0},
        f"{stage}/gqa": {"accuracy": 0.0},
        f"{stage}/nlvr2": {"accuracy": 50.0, "consistency": 0.0},
    }
    assert module.scores == expected
    assert logged == {f"{task}/{name}": value for task, named in expected.items() for name, value in named.items()}


def test_validation_can_compute_fewer_caption_metrics_than_test(tmp_path: Path) -> None:
    captions = {"1": "a red bus stops", "2": "two dogs run home"}
    data = [batch("caption", list(captions), [{"captions": [text]} for text in captions.values()])]
    module = Fixed(captions)
    run = trainer(tmp_path, CaptionMetrics(metrics=["cider", "bleu", "rouge_l"], val_metrics=["rouge_l"]))
    run.validate(module, loader(data), verbose=False)
    run.test(module, loader(data), verbose=False)
    assert module.scores["val/caption"] == {"rouge_l": pytest.approx(100.0)}
    assert set(module.scores["test/caption"]) == {"cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"}


def test_a_score_that_is_not_defined_is_neither_logged_nor_kept(tmp_path: Path) -> None:
    module = Fixed({"1": "a red bus stops"})
    data = [batch("caption", ["1"], [{"captions": ["a red bus stops"]}])]
    with pytest.warns(UserWarning, match="CIDEr left out"):
        logged = trainer(tmp_path, CaptionMetrics(metrics=["cider", "rouge_l"])).test(
            module, loader(data), verbose=False
        )
    assert logged == [{"test/caption/rouge_l": pytest.approx(100.0)}]
    assert module.scores["test/caption"] == {"rouge_l": pytest.approx(100.0)}


def test_the_sanity_check_logs_nothing_and_a_fit_logs_each_epoch(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Watched(Fixed):
        def on_validation_epoch_end(self) -> None:
            seen.append({task: dict(named) for task, named in self.scores.items()})
            self.answers = {**ANSWERS, "3": "right"}

    run = trainer(tmp_path, VQAMetrics(), max_epochs=2, num_sanity_val_steps=-1)
    run.fit(Watched(ANSWERS), loader(batches()[:1]), loader(batches()))
    assert seen[0] == {}
    assert [scores["val/gqa"]["accuracy"] for scores in seen[1:]] == [100.0, 100.0]
    assert run.callback_metrics["val/gqa/accuracy"] == 100.0


def test_a_task_that_did_not_appear_leaves_no_score_of_an_older_epoch(tmp_path: Path) -> None:
    module = Fixed(ANSWERS)
    run = trainer(tmp_path, VQAMetrics())
    run.validate(module, loader(batches()), verbose=False)
    logged = run.validate(module, loader(batches()[2:3]), verbose=False)[0]
    assert set(logged) == {"val/gqa/accuracy"}
    assert set(module.scores) == {"val/gqa"}


def test_samples_without_references_are_not_scored(tmp_path: Path) -> None:
    assert trainer(tmp_path, VQAMetrics()).test(Fixed(ANSWERS), loader([batch("vqa", ["1"], [])]), verbose=False) == [
        {}
    ]


@pytest.mark.parametrize(
    ("outputs", "got"), [(None, "NoneType without"), ({"predictions": ["a", "b"]}, "2 predictions")]
)
def test_a_step_without_one_prediction_a_sample_is_an_error(outputs: Any, got: str, tmp_path: Path) -> None:
    module = Fixed(ANSWERS)
    module.test_step = lambda batch: outputs
    with pytest.raises(ValueError, match=f"for 1 samples of task vqa it returned {got}"):
        trainer(tmp_path, VQAMetrics()).test(module, loader(batches()[:1]), verbose=False)


def test_two_processes_log_and_write_what_one_does(tmp_path: Path) -> None:
    results, files = [], []
    for devices in (1, 2):  # four batches of three tasks: no rank gets all of them
        folder = tmp_path / str(devices)
        options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
        run = trainer(folder, VQAMetrics(), PredictionWriter(str(folder)), **options)
        results.append(run.test(Fixed(ANSWERS), loader([*batches(), batches()[0]]), verbose=False))
        files.append({path.name: path.read_text() for path in folder.iterdir()})
    assert results[0] == results[1]
    assert files[0] == files[1]
    assert "test_nlvr2_submission.csv" in files[0]


def test_unknown_caption_metric_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="choose some of"):
        CaptionMetrics(val_metrics=["cidre"])
