"""Data logged to Weights & Biases, read back from the files of a requeued offline run."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from tests.data_modules.tiny_data import coco
from tests.requeued import PATIENCE, ROOT, Run, ask, tiny_config
from vlpet_lightning.__main__ import for_the_user, run

ROWS = 2
WITHOUT_PICTURE = coco(8)


def scan(path: Path) -> Iterator[Any]:
    """Read the records of a ``.wandb`` file: a LevelDB-style log in blocks of 32 KiB after a seven-byte header."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])  # kind: whole, first, middle or last part
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


class Kept:
    """Read the records of one offline folder."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "files"
        (path,) = folder.glob("run-*.wandb")
        end = time.monotonic() + PATIENCE
        self.records = list(scan(path))
        while not any(record.HasField("exit") for record in self.records):  # wandb.finish() does not wait for it
            assert time.monotonic() < end, f"{path} has no end"
            time.sleep(0.05)
            self.records = list(scan(path))

    def ids(self) -> set[str]:
        return {record.run.run_id for record in self.records if record.HasField("run")}

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for record in self.records:
            for updates in (record.config.update, record.run.config.update):
                for item in updates:
                    found[item.key or item.nested_key[0]] = json.loads(item.value_json)
        return {name: value for name, value in found.items() if not name.startswith("_")}

    def history(self) -> list[dict[str, Any]]:
        rows = [record.history.item for record in self.records if record.HasField("history")]
        return [{"/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]

    def table(self, name: str) -> tuple[dict[str, Any], set[str]]:
        """Return a table and its images."""
        for record in self.records:
            kept = {file.path: Path(file.local_path) for file in record.artifact.manifest.contents}
            if f"{name}.table.json" in kept:
                table = json.loads(kept.pop(f"{name}.table.json").read_text())
                return table, {picture for picture, path in kept.items() if path.is_file()}
        raise AssertionError(f"no table {name}")


@pytest.fixture(scope="module")
def requeued(tmp_path_factory, tiny_backbone):
    """A run with the shipped loggers, preempted in the first validation and restarted."""
    folder = tmp_path_factory.mktemp("wandb")
    root = folder / "world"
    root.mkdir()
    config = tiny_config(root, tiny_backbone)
    pictures = root / "pictures" / "val"
    pictures.mkdir(parents=True)
    for name in [
        *(coco(number) for number in range(7, 11)),
        *(f"valid-{n}-img{side}" for n in range(30) for side in "01"),
    ]:
        if name != WITHOUT_PICTURE:
            Image.new("RGB", (8, 6), "red").save(pictures / f"{name}.png")
    loggers = yaml.safe_load((ROOT / "experiments/image_text.yaml").read_text())["trainer"]["logger"]
    for logger in loggers:
        logger["init_args"]["save_dir"] = str(folder / "runs")
    loggers[0]["init_args"]["name"] = "run"
    callbacks = [{"class_path": f"callbacks.{name}"} for name in ("Preemption", "ParameterCount", "VQAMetrics")]
    writer = {"table_rows": ROWS, "images": str(root / "pictures")}
    callbacks.append({"class_path": "callbacks.PredictionWriter", "init_args": writer})
    made = Run(
        config,
        folder / "runs",
        logger=loggers,
        callbacks=callbacks,
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=1.0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(folder / "staged"))  # tables and images are kept there until the upload
        patch.setenv("WANDB_MODE", "offline")  # the logger changes it
        wandb.teardown()  # from other tests: an open run would be continued
        assert made.end_here(*ask(hook="validation", at=1)) == 75
        wandb.finish(75)
        time.sleep(1.1)  # names of offline folders have a resolution of one second
        assert made.end_here() == 0
        wandb.finish()
    starts = [Kept(path) for path in sorted((folder / "runs" / "wandb").glob("offline-run-*"))]
    return made, starts


def test_a_requeued_run_keeps_its_id_and_is_gone_on_with(requeued):
    _, starts = requeued
    assert [start.ids() for start in starts] == [{"one"}, {"one"}]
    assert [start.config()["trainer"]["logger"][1]["init_args"]["resume"] for start in starts] == ["allow", "allow"]


def test_the_config_is_the_one_that_was_saved(requeued):
    made, starts = requeued
    text = (made.home / "config.yaml").read_text()
    config = starts[-1].config()
    assert config.pop("protocol") == json.loads((made.home / "protocol.json").read_text())
    assert config == yaml.safe_load(text)
    assert {"trainer", "model", "data"} < set(starts[-1].config())
    assert "${" not in text  # no unresolved interpolation


def test_parameters_are_a_table(requeued):
    made, starts = requeued
    table, _ = starts[0].table("parameters")
    assert table["columns"] == ["group", "trainable", "total"]
    counted = json.loads((made.home / "parameters.json").read_text())
    assert sum(row[1] for row in table["data"]) == counted["trainable"]


def test_predictions_are_a_table_with_their_pictures(requeued):
    _, starts = requeued
    table, kept = starts[-1].table("val/vqa/predictions")
    assert table["columns"] == ["question_id", "prediction", "images", "text", "reference", "picture 1"]
    assert len(table["data"]) == ROWS
    pictures = {json.loads(row[2])[0]: row[5] for row in table["data"]}
    assert pictures.pop(WITHOUT_PICTURE) is None
    (picture,) = pictures.values()
    assert (picture["_type"], picture["width"], picture["height"]) == ("image-file", 8, 6)
    assert kept == {picture["path"]}
    pairs, _ = starts[-1].table("val/nlvr2/predictions")
    assert pairs["columns"][-2:] == ["picture 1", "picture 2"]
    assert all(cell["_type"] == "image-file" for row in pairs["data"] for cell in row[-2:])


def test_the_validation_that_was_left_is_there_once(requeued):
    _, starts = requeued
    found = [[row["trainer/global_step"] for row in start.history() if "val/average" in row] for start in starts]
    assert found == [[], [2]]


def test_a_wandb_logger_alone_is_refused_as_it_has_no_folder_for_a_run(requeued, tmp_path):
    made, _ = requeued
    alone = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"save_dir": str(tmp_path)}}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump({"trainer": {"logger": alone}}))
    with pytest.raises(Exception, match="begins with a WandbLogger") as refused:
        run(["fit", *made.words[:-2], "--config", str(tmp_path / "alone.yaml")])
    assert "Put vlpet_lightning.loggers.CSVLog before it" in str(for_the_user(refused.value))
    assert [path.name for path in tmp_path.iterdir()] == ["alone.yaml"]


def test_a_folder_of_pictures_that_is_not_there_is_named(requeued):
    made, _ = requeued
    writer = ["--trainer.callbacks+=callbacks.PredictionWriter", "--trainer.callbacks.images=nowhere"]
    with pytest.raises(Exception, match="no folder nowhere") as refused:
        run(["fit", *made.words[:-2], *writer])
    assert for_the_user(refused.value) is not None
