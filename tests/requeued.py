"""Runs of the shipped experiment on a tiny world that are preempted or killed, and restarted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from tests.data_modules.tiny_data import DIM, write_world
from vlpet_lightning.__main__ import run
from vlpet_lightning.run.signals import SIGNALS

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0


class Ask(Callback):
    """Sends a signal to its own process once, at a given point of a run.

    Args:
        hook: Hook that sends the signal.
        at: Step, or batch of a validation.
        number: Signal number.
        rank: Rank that sends it; None for all.
    """

    def __init__(self, hook: str, at: int = 0, number: int = int(signal.SIGUSR1), rank: int | None = 0) -> None:
        self.hook, self.at, self.number, self.rank = hook, at, number, rank
        self.asked = False

    def _reached(self, hook: str, at: int, trainer: Any) -> None:
        here = self.rank is None or self.rank == trainer.global_rank
        if here and (hook, at) == (self.hook, self.at) and not self.asked:
            self.asked = True
            os.kill(os.getpid(), self.number)

    def setup(self, trainer, pl_module, stage):
        self._reached("setup", 0, trainer)

    def on_before_backward(self, trainer, pl_module, loss):
        self._reached("backward", trainer.global_step, trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._reached("validation", batch_idx, trainer)


class Slow(Callback):
    """Makes a run last for minutes."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(2.0)


def tiny_config(root: Path, backbone: Path, **model: Any) -> Path:
    """Write an overlay for experiments/image_text.yaml, and its data.

    Args:
        root: Folder.
        backbone: Folder of the backbone, which is copied.
        model: Settings of the model that are not those of BART.
    """
    write_world(root)
    shutil.copytree(backbone, root / "backbone")
    keep = {"filename": "resume", "every_n_train_steps": 1, "enable_version_counter": False}
    last = {"filename": "final", "save_last": True}
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    overlay = {
        "trainer": {
            "max_epochs": 4,
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "callbacks.Preemption"},
                {"class_path": checkpoint, "init_args": last},
                {"class_path": checkpoint, "init_args": keep},
            ],
        },
        "model": {"init_args": {"backbone": str(root / "backbone"), "feature_dim": DIM, "grid": 2} | model},
        "data": {"init_args": {"root": str(root), "batch_size": 3}},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    return root / "tiny.yaml"


def ask(**where: Any) -> list[str]:
    """Return arguments that add :class:`Ask` to a run's callbacks."""
    given = [f"--trainer.callbacks.{name}={value}" for name, value in where.items()]
    return ["--trainer.callbacks+=tests.requeued.Ask", *given]


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore the signal handlers that a run changes."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """A run that can be restarted.

    Args:
        config: Overlay for the shipped experiment.
        folder: Folder of the run.
        overlays: Shipped overlays between the two, without their ending.
        trainer: Settings of the trainer.
    """

    def __init__(self, config: Path, folder: Path, overlays: Sequence[str] = (), **trainer: Any) -> None:
        logger = {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": str(folder), "name": "run"}}
        folder.mkdir(exist_ok=True)
        (folder / "trainer.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger, **trainer}}))
        shipped = [ROOT / "experiments" / f"{name}.yaml" for name in ("image_text", *overlays)]
        paths = (*shipped, config, folder / "trainer.yaml")
        self.words = [word for path in paths for word in ("--config", str(path))] + ["--ckpt_path", "auto"]
        self.home = folder / "run" / "one"
        self.folder = self.home / "checkpoints"

    def start(self, *words: str) -> subprocess.Popen:
        """Start a process as a user would."""
        command = [sys.executable, "-m", "vlpet_lightning", "fit", *self.words, *words]
        environment = os.environ | {"VLPET_RUN": "one", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def fork(self, *words: str) -> ForkProcess:
        """Fork a process that has already imported everything, in a group of its own; see :meth:`errors`."""
        process = get_context("fork").Process(target=self._begin, args=words)
        process.start()
        return process

    def _begin(self, *words: str) -> None:
        os.setsid()
        with self._errors.open("a") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            sys.exit(self.end_here(*words))

    @property
    def _errors(self) -> Path:
        return self.home.parents[1] / "errors.txt"

    def errors(self, process: ForkProcess) -> str:
        """Return the standard error of the forked processes, once the last one has ended."""
        process.join(PATIENCE)
        assert process.exitcode is not None
        return self._errors.read_text()

    def end(self, *words: str) -> tuple[int, str]:
        """Return status and standard error of a start without interruption from outside."""
        process = self.start(*words)
        _, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, errors

    def end_here(self, *words: str) -> int:
        """Return the status of a start in this process."""
        with pytest.MonkeyPatch.context() as patch, handlers_kept():
            patch.setenv("VLPET_RUN", "one")
            try:
                return run(["fit", *self.words, *words])
            except SystemExit as ended:
                return int(ended.code or 0)

    def finish(self) -> dict[str, torch.Tensor]:
        process = self.fork()
        process.join(PATIENCE)
        assert process.exitcode == 0
        return self.load("last.ckpt")["state_dict"]

    def load(self, name: str) -> dict:
        return torch.load(self.folder / name, weights_only=True)

    def trains(self, ended: Callable[[], int | None]) -> None:
        """Wait until a running process has written a checkpoint."""
        before, end = self.written(), time.monotonic() + PATIENCE
        while self.written() == before:
            assert ended() is None, f"it ended with {ended()}"
            assert time.monotonic() < end, f"no new checkpoint in {self.folder}"
            time.sleep(0.002)

    def written(self) -> int:
        path = self.folder / "resume.ckpt"
        return path.stat().st_mtime_ns if path.exists() else 0
