"""Prediction files, and submission files for the evaluation servers."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.task_metrics import predictions_of
from vlpet_lightning.batch import Batch
from vlpet_lightning.metrics import gather_objects
from vlpet_lightning.prediction_files import Record, as_json
from vlpet_lightning.run.protocol_log import record_of
from vlpet_lightning.submissions import FORMATS, SubmissionError

PICTURES = {".jpg", ".jpeg", ".png"}


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp creates private files; ordinary files are not private
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _records(outputs: Any, batch: Batch) -> list[Record]:
    return [
        {
            "question_id": id,
            "prediction": prediction,
            "images": list(batch.images[i]) if batch.images else [],
            "text": batch.texts[i] if batch.texts else "",
            "reference": batch.references[i] if batch.references else None,
        }
        for i, (id, prediction) in enumerate(zip(batch.ids, predictions_of(outputs, batch), strict=True))
    ]


class PredictionWriter(Callback):
    """Write the predictions of validation, test and predict to ``{stage}_{task}.json``, sorted by id.

    Each id is written once, for any number of ranks. Every task also gets ``{stage}_{task}_submission`` in the format
    of its evaluation server, and a Weights & Biases logger gets a table of sample rows.

    Args:
        folder: Output folder; None for ``predictions`` in the run's log folder.
        table_rows: Number of rows of the Weights & Biases table; 0 for none.
        images: Folder of pictures ``{image id}.jpg`` (or .jpeg, .png), at any depth, for the Weights & Biases table;
            None for a table without pictures.

    Raises:
        ValueError: If ``table_rows`` is negative.
        FileNotFoundError: If ``images`` is not a folder.
    """

    def __init__(self, folder: str | None = None, table_rows: int = 32, images: str | None = None) -> None:
        if table_rows < 0:
            raise ValueError(f"table_rows must be 0 or more, got {table_rows}")
        if images is not None and not Path(images).is_dir():
            raise FileNotFoundError(f"images: there is no folder {images}: give one with {{image id}}.jpg, or null")
        self.folder = folder
        self.table_rows = table_rows
        self.images = images
        self._pictures: dict[str, Path] | None = None
        self._collected: dict[str, list[Record]] = {}

    def _folder(self, trainer: Trainer) -> Path:
        # log_dir is a collective call: every rank must make it
        return Path(self.folder) if self.folder else Path(trainer.log_dir or trainer.default_root_dir) / "predictions"

    def _collect(self, trainer: Trainer, outputs: Any, batch: Batch) -> None:
        if not (trainer.sanity_checking or getattr(trainer, "fast_dev_run", False)):  # a trial run leaves no files
            self._collected.setdefault(batch.task, []).extend(_records(outputs, batch))

    def _finish(self, trainer: Trainer, stage: str) -> None:
        if trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
            return
        folder = self._folder(trainer)
        ranks = gather_objects(self._collected)
        self._collected = {}
        if not trainer.is_global_zero:
            return
        for task in sorted({task for rank in ranks for task in rank}):
            found = [record for rank in ranks for record in rank.get(task, [])]
            found.sort(key=lambda record: (record["question_id"], record["prediction"]), reverse=True)
            distinct = {record["question_id"]: record for record in found}  # the metrics keep the same one
            records = [distinct[id] for id in sorted(distinct)]
            self._write(folder, f"{stage}_{task}", task, records, record_of(trainer))
            self._log_table(trainer, f"{stage}/{task}/predictions", records)

    def _write(self, folder: Path, name: str, task: str, records: list[Record], protocol: dict[str, Any]) -> None:
        write_atomically(folder / f"{name}.json", as_json(records, protocol))
        server = FORMATS.get(task)
        if server is None:
            return
        try:
            content = server.write(records)
        except SubmissionError as error:  # predictions of own data are not for a server
            rank_zero_warn(f"no submission file for {task}: {error}", category=UserWarning)
            return
        write_atomically(folder / f"{name}_submission.{server.suffix}", content)

    def _log_table(self, trainer: Trainer, key: str, records: list[Record]) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        step = max(1, -(-len(records) // max(1, self.table_rows)))  # evenly spaced over the ids
        sample = records[::step] if self.table_rows and loggers else []
        if not sample:
            return
        columns = list(sample[0])
        rows = [[v if isinstance(v, str) else json.dumps(v) for v in record.values()] for record in sample]
        if self.images is not None:
            shown = max(len(record["images"]) for record in sample)
            columns += [f"picture {number + 1}" for number in range(shown)]
            rows = [row + self._cells(record["images"], shown) for row, record in zip(rows, sample, strict=True)]
        for logger in loggers:
            logger.log_table(key=key, columns=columns, data=rows, step=trainer.global_step)

    def _cells(self, ids: list[str], count: int) -> list[Any]:
        """Return the pictures of a row's images; None if there is no file."""
        import wandb  # takes half a second, which runs without W&B save

        if self._pictures is None:  # once per run: the folder may have 100,000 files
            files = Path(str(self.images)).rglob("*")
            self._pictures = {path.stem: path for path in files if path.suffix.lower() in PICTURES}
        found = [self._pictures.get(id) for id in ids]
        cells = [None if path is None else wandb.Image(str(path)) for path in found]
        return cells + [None] * (count - len(cells))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collected = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collected = {}

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collected = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "test")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "predict")
