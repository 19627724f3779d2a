"""Runs that are asked to end, killed or out of disk go on as if nothing had been: real processes, real signals."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch.multiprocessing import ProcessExitedException

from callbacks import Preemption
from tests.data_modules.tiny_data import DIM, write_world
from tests.runs import Batches, make_batch, quiet_trainer, tiny_module
from vlpet_lightning.checkpoint_io import AtomicCheckpointIO, CheckpointNotWritten
from vlpet_lightning.run_name import newest_checkpoint, run_name

ROOT = Path(__file__).parents[1]
PREEMPTED = 75
PATIENCE = 120.0


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_backbone):
    """The shipped experiment on a tiny world."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    shutil.copytree(tiny_backbone, root / "backbone")
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
        "model": {"init_args": {"backbone": str(root / "backbone"), "feature_dim": DIM, "grid": 2}},
        "data": {"init_args": {"root": str(root), "batch_size": 3}},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    return root / "tiny.yaml"


class Run:
    """A run that can be started again and again."""

    def __init__(self, config: Path, folder: Path, **trainer) -> None:
        logger = {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": str(folder), "name": "run"}}
        folder.mkdir(exist_ok=True)
        (folder / "logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger, **trainer}}))
        paths = (ROOT / "experiments/image_text.yaml", config, folder / "logger.yaml")
        self.words = [word for path in paths for word in ("--config", str(path))]
        self.folder = folder / "run" / "one" / "checkpoints"

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "vlpet_lightning", "fit", *self.words, "--ckpt_path", "auto"]
        environment = os.environ | {"VLPET_RUN": "one", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(self) -> dict[str, torch.Tensor]:
        process = self.start()
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        return self.load("last.ckpt")["state_dict"]

    def load(self, name: str) -> dict:
        return torch.load(self.folder / name, weights_only=True)

    def trains(self, process: subprocess.Popen) -> None:
        """Wait until it has written a checkpoint of its own."""
        path, before, end = self.folder / "resume.ckpt", self.written(), time.monotonic() + PATIENCE
        while self.written() == before:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, f"no new {path}"
            time.sleep(0.002)

    def written(self) -> int:
        path = self.folder / "resume.ckpt"
        return path.stat().st_mtime_ns if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    return Run(config, tmp_path_factory.mktemp("whole")).finish()


def equal(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_end_says_so_and_goes_on_bit_equal(config, undisturbed, tmp_path, number):
    run = Run(config, tmp_path / "run")
    process = run.start()
    run.trains(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == PREEMPTED, errors
    step = run.load("resume.ckpt")["global_step"]
    assert f"asked to end at step {step}" in errors
    assert equal(run.finish(), undisturbed)


class Ask(Callback):
    """Signals one rank in the middle of a step."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_one_rank_that_is_asked_ends_all_of_them_at_the_same_step(tiny_backbone, tmp_path):
    data = Batches([make_batch("gqa", 4, seed) for seed in range(8)])
    trainer = quiet_trainer(tmp_path, callbacks=[Ask(), Preemption()], devices=2, strategy="ddp_fork")
    with pytest.raises(ProcessExitedException) as ended:
        trainer.fit(tiny_module(tiny_backbone), data)
    assert ended.value.exit_code == PREEMPTED
    saved = torch.load(tmp_path / "checkpoints" / "resume.ckpt", weights_only=True)
    assert saved["global_step"] == 4  # asked in the third step, agreed upon after the fourth


def kill_and_resume(run, kills):
    draw = random.Random(0)
    for _ in range(kills):
        process = run.start()
        run.trains(process)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL
        assert run.load("resume.ckpt")["global_step"] > 0  # whole, every time
    return run.finish()


def test_a_run_that_is_killed_at_random_moments_goes_on_bit_equal(config, undisturbed, tmp_path):
    assert equal(kill_and_resume(Run(config, tmp_path / "run"), 3), undisturbed)


@pytest.mark.slow
def test_a_run_that_is_killed_fifty_times_goes_on_bit_equal(config, tmp_path):
    whole = Run(config, tmp_path / "whole", max_epochs=16).finish()
    assert equal(kill_and_resume(Run(config, tmp_path / "run", max_epochs=16), 50), whole)


def test_a_full_disk_is_named_and_costs_no_earlier_checkpoint(tmp_path):
    path, io = tmp_path / "resume.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": torch.tensor(1)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # what a quota does
    try:
        with pytest.raises(CheckpointNotWritten, match=rf"resume.ckpt was not written: .* the disk of {tmp_path} has"):
            io.save_checkpoint({"step": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert [file.name for file in tmp_path.iterdir()] == ["resume.ckpt"]


def test_a_run_has_the_same_name_after_a_requeue():
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert run_name({"SLURM_JOB_ID": "9"}) == "job_9"
    assert run_name(array) == "job_7_2"
    assert run_name(array | {"VLPET_RUN": "mine"}) == "mine"
    with pytest.raises(ValueError, match="set the environment variable VLPET_RUN"):
        run_name({})


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for age, name in enumerate(("last.ckpt", "resume.ckpt", "best-3.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(age, age))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "resume.ckpt")
