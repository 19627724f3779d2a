"""Prediction files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger

from callbacks.predictions import PredictionWriter, write_atomically
from tests.callbacks.evaluated import Fixed, batch, loader, trainer, vqa
from vlpet_lightning.prediction_files import read_predictions

pytestmark = pytest.mark.filterwarnings("ignore:The .*_dataloader:UserWarning", "ignore:.*does not have many workers.*")

ANSWERS = {"12": "a dog", "7": "café", "n1": "true", "n2": "false"}


def test_every_id_is_written_once_in_order(tmp_path: Path) -> None:
    batches = [batch("vqa", ["7", "12"], [vqa("x"), vqa("y")]), batch("vqa", ["7"], [vqa("x")])]
    trainer(tmp_path, PredictionWriter()).test(Fixed(ANSWERS), loader(batches), verbose=False)
    written = read_predictions(tmp_path / "predictions" / "test_vqa.json").records
    assert [record["question_id"] for record in written] == ["12", "7"]
    assert written[1] == {
        "question_id": "7",
        "prediction": "café",
        "images": ["image7"],
        "text": "what is 7?",
        "reference": vqa("x"),
    }


def test_submissions_have_the_form_of_their_servers(tmp_path: Path) -> None:
    identified = [{"label": "true", "identifier": f"test1-{i}-0-0"} for i in range(2)]
    batches = [batch("vqa", ["7", "12"], [vqa("x"), vqa("y")]), batch("nlvr2", ["n1", "n2"], identified)]
    trainer(tmp_path, PredictionWriter(str(tmp_path / "out"))).validate(Fixed(ANSWERS), loader(batches), verbose=False)
    submitted = json.loads((tmp_path / "out" / "val_vqa_submission.json").read_text())
    assert submitted == [{"question_id": 12, "answer": "a dog"}, {"question_id": 7, "answer": "café"}]
    lines = (tmp_path / "out" / "val_nlvr2_submission.csv").read_text()
    assert lines == "test1-0-0-0,True\ntest1-1-0-0,False\n"


def test_predict_writes_without_references(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path))
    trainer(tmp_path, writer).predict(Fixed(ANSWERS), loader([batch("nlvr2", ["n1"], [])]))
    assert read_predictions(tmp_path / "predict_nlvr2.json").records[0]["reference"] is None
    assert (tmp_path / "predict_nlvr2_submission.csv").read_text() == "n1,True\n"


def test_the_sanity_check_writes_nothing(tmp_path: Path) -> None:
    batches = loader([batch("vqa", ["7"], [vqa("x")])])
    run = trainer(tmp_path, PredictionWriter(), max_epochs=1, num_sanity_val_steps=1, limit_train_batches=0)
    run.fit(Fixed(ANSWERS), batches, batches)
    assert not (tmp_path / "predictions").exists()


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, PredictionWriter(str(tmp_path / "out")), fast_dev_run=True)
    run.test(Fixed(ANSWERS), loader([batch("vqa", ["7"], [vqa("x")])]), verbose=False)
    assert not (tmp_path / "out").exists()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_wandb_logger_gets_a_small_table(tmp_path: Path) -> None:
    tables: list[dict[str, Any]] = []

    class Recording(WandbLogger):
        def log_table(self, **table: Any) -> None:  # type: ignore[override]
            tables.append(table)

        def log_metrics(self, *_: Any, **__: Any) -> None: ...

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

        def finalize(self, status: str) -> None: ...

        @property
        def experiment(self) -> Any:  # type: ignore[override]
            return None

    ids = [str(i) for i in range(10, 20)]
    batches = loader([batch("vqa", ids, [vqa("x")] * 10)])
    run = trainer(tmp_path, PredictionWriter(table_rows=3), logger=Recording(save_dir=tmp_path, offline=True))
    run.test(Fixed(dict.fromkeys(ids, "x")), batches, verbose=False)
    (table,) = tables
    assert table["key"] == "test/vqa/predictions"
    assert table["columns"] == ["question_id", "prediction", "images", "text", "reference"]
    assert [row[0] for row in table["data"]] == ["10", "14", "18"]
    assert table["data"][0][2] == '["image10"]'


def test_negative_table_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="table_rows must be 0 or more, got -1"):
        PredictionWriter(table_rows=-1)
