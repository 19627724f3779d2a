"""Evaluation sorted by length: the same predictions, and files in the same order."""

from __future__ import annotations

import json
from pathlib import Path

from callbacks import PredictionWriter
from data_modules.image_text import ImageTextDataModule
from tests.data_modules.tiny_data import DIM, coco, vqa_record, write_json, write_world
from tests.runs import quiet_trainer, tiny_module


def test_prediction_files_do_not_depend_on_the_order_of_evaluation(tiny_backbone: Path, tmp_path: Path) -> None:
    write_world(tmp_path)
    records = [vqa_record(i, coco(i)) | {"sent": "big red " * (1 + i * 3 % 7)} for i in range(11, 15)]
    write_json(tmp_path / "vqa/karpathy_test.json", records)
    module = tiny_module(tiny_backbone, placements=[], trainable=["all"], feature_dim=DIM)
    train = ImageTextDataModule(str(tmp_path), str(tiny_backbone), ["vqa", "gqa"], batch_size=7)
    quiet_trainer(tmp_path, max_epochs=25, limit_val_batches=0).fit(module, train)
    found, firsts = [], []
    for by_length in (False, True):
        folder = tmp_path / f"{by_length}"
        data = ImageTextDataModule(
            str(tmp_path), str(tiny_backbone), ["vqa", "gqa"], eval_batch_size=2, eval_by_length=by_length
        )
        quiet_trainer(tmp_path, callbacks=[PredictionWriter(str(folder))]).predict(module, data)
        found.append({path.name: path.read_text() for path in sorted(folder.iterdir())})
        firsts.append(next(iter(data.predict_dataloader())).ids)
    assert firsts[0] != firsts[1]
    assert found[0] == found[1]
    written = json.loads(found[0]["predict_vqa.json"])["predictions"]
    assert [record["question_id"] for record in written] == ["11", "12", "13", "14"]
    assert all(record["prediction"] for record in written)  # an untrained model answers nothing
