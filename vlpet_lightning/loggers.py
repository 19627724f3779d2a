"""A CSV logger that survives a restart."""

from __future__ import annotations

import csv
import io
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from vlpet_lightning.atomic_file import atomic_write

PROTOCOL = "protocol"  # column with the digest of the run's protocol record, the only one that holds text


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's ``metrics.csv`` without their empty cells; none where there is no file.

    What a kill, or a full disk, has left in pieces is skipped with a warning.
    """
    path = folder / ExperimentWriter.NAME_METRICS_FILE
    return [{name: float(value) for name, value in row.items() if name != PROTOCOL} for row in _rows(path)]


def read_protocols(folder: Path, stage: str) -> dict[str, str]:
    """Return the digest of the protocol record of each task's last scores, from a run's ``metrics.csv``.

    Args:
        folder: Run folder.
        stage: ``val`` or ``test``.

    Returns:
        Digests by task; tasks whose scores are older than these records have none.
    """
    found: dict[str, str] = {}
    for row in _rows(folder / ExperimentWriter.NAME_METRICS_FILE):
        for name in row:
            where, _, rest = name.partition("/")
            task, _, metric = rest.partition("/")
            if where == stage and metric:
                found[task] = row.get(PROTOCOL, "")
    return {task: digest for task, digest in found.items() if digest}


def _rows(path: Path) -> list[dict[str, str]]:
    """The cells that hold a number, as they are written."""
    if not path.is_file():
        return []
    # each line on its own: a stray quote would take in all that follow
    lines = path.read_bytes().decode(errors="replace").split("\n")
    rest = lines.pop()  # of a line that was not finished: its last number may be cut
    names, *table = (_cells(line) for line in lines or [""])
    found = []
    for number, cells in enumerate(table, start=2):
        if len(cells) != len(names):
            _warn(path, number, f"has {len(cells)} cells under {len(names)} names and is skipped")
            continue
        row = {name: value for name, value in zip(names, cells, strict=True) if value}
        unread = [name for name, value in row.items() if name != PROTOCOL and not _is_number(value)]
        if unread:
            _warn(path, number, f"has {row[unread[0]][:40]!r} for {unread[0]}: what is no number is skipped")
        found.append({name: value for name, value in row.items() if name not in unread})
    if rest:
        _warn(path, len(lines) + 1, "has no end and is skipped")
    return found


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r")]), [])
    except csv.Error:  # a cell without end
        return []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _warn(path: Path, line: int, what: str) -> None:
    warnings.warn(f"{path}, line {line}: {what}", stacklevel=4)


class _Writer(ExperimentWriter):
    """Lightning's deletes an earlier file, and empties it for a new name before writing it: a kill costs all rows."""

    protocol: str | None = None

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        earlier = _rows(Path(self.metrics_file_path))
        if earlier:
            self._write(earlier)

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics_dict | ({} if self.protocol is None else {PROTOCOL: self.protocol}), step)

    def _check_log_dir_exists(self) -> None:
        """Nothing is deleted."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(_rows(Path(self.metrics_file_path)))

    def _write(self, rows: list[dict[str, str]]) -> None:
        names = sorted(set(self.metrics_keys).union(*rows))
        self.metrics_keys = []  # where this cannot be written all names are new to the next attempt
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, names)
        table.writeheader()
        table.writerows(rows)
        with atomic_write(Path(self.metrics_file_path), f".{os.getpid()}.part") as file:
            file.write(text.getvalue().encode())
        self.metrics_keys = names


class CSVLog(CSVLogger):
    """Lightning's CSVLogger, which deletes an earlier ``metrics.csv`` of its folder, without the deleting.

    A resumed run, or a test after a fit, appends to the same file. Repeated steps appear twice: the later row
    counts. The file is written with every checkpoint, so that a run which resumes from one
    finds the rows before it. Once ``protocol`` is set to the digest of a record (:mod:`vlpet_lightning.protocol`),
    every row has it in its column ``protocol``.
    """

    protocol: str | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and _is_local_file_protocol(self.log_dir):
            self._experiment = _Writer(self.log_dir)
        if isinstance(self._experiment, _Writer):
            self._experiment.protocol = self.protocol
        return super().experiment

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.save()
