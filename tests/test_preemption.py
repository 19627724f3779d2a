"""Exact resuming of runs that were preempted, killed or out of disk space, with real processes and signals."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from lightning.pytorch import Callback
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

from callbacks import Preemption
from tests.requeued import PATIENCE, Ask, Run, ask, tiny_config
from tests.runs import Batches, make_batch, quiet_trainer, tiny_module
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.run.checkpoint_io import AtomicCheckpointIO, CheckpointNotWritten
from vlpet_lightning.run.resume import newest_checkpoint, run_name
from vlpet_lightning.run.signals import SIGNALS, leave_when_asked, undo

PREEMPTED = 75


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_backbone):
    """The shipped experiment on a tiny world."""
    return tiny_config(tmp_path_factory.mktemp("world"), tiny_backbone)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    return Run(config, tmp_path_factory.mktemp("whole")).finish()


def equal(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_end_says_so_and_goes_on_bit_equal(config, undisturbed, tmp_path, number):
    run = Run(config, tmp_path / "run")
    process = run.start()
    run.trains(process.poll)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == PREEMPTED, errors
    step = run.load("resume.ckpt")["global_step"]
    assert f"asked to end at step {step}" in errors
    assert equal(run.finish(), undisturbed)


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))],
)
def test_a_signal_to_all_processes_of_a_run_does_not_end_those_that_load_its_data(
    config, undisturbed, tmp_path, number
):
    """Signal all processes of a run, as SLURM does for a step and a terminal for a process group."""
    run = Run(config, tmp_path / "run")
    process = run.fork("--data.init_args.num_workers=2")
    run.trains(partial(getattr, process, "exitcode"))
    os.killpg(process.pid, number)
    errors = run.errors(process)
    assert "DataLoader worker" not in errors
    if number != signal.SIGINT:
        assert process.exitcode == PREEMPTED, errors
    assert equal(run.finish(), undisturbed)


class Validated(Batches):
    """Batches for training and validation, with one more validation batch on rank 0."""

    def val_dataloader(self):
        return DataLoader(self.batches[: 4 - self.trainer.global_rank], batch_size=None)


class Ended(Callback):
    """Records the progress of a rank."""

    def __init__(self, folder):
        self.folder, self.validated = folder, 0

    def on_validation_batch_end(self, trainer, *_):
        self.validated += not trainer.sanity_checking

    def on_fit_end(self, trainer, pl_module):
        text = f"steps {trainer.global_step}, validated {self.validated}"
        (self.folder / f"{trainer.global_rank}.txt").write_text(text)


def fit_on_two_ranks(backbone, folder, *callbacks, **changes):
    data = Validated([make_batch("gqa", 4, seed) for seed in range(8)])
    trainer = quiet_trainer(folder, callbacks=[*callbacks], devices=2, strategy="ddp_fork", **changes)
    trainer.fit(tiny_module(backbone), data)


@pytest.mark.parametrize(
    ("hook", "at", "step", "due"),
    [
        ("backward", 2, 4, False),  # signalled in the third step, agreed upon after the fourth
        ("backward", 7, 8, True),  # signalled in the last step
        ("validation", 0, 8, True),
    ],
)
def test_one_rank_that_is_asked_ends_all_of_them_at_the_same_step(tiny_backbone, tmp_path, hook, at, step, due):
    with pytest.raises(ProcessExitedException) as ended:
        fit_on_two_ranks(tiny_backbone, tmp_path, Ask(hook, at, rank=1), Preemption(), num_sanity_val_steps=0)
    assert ended.value.exit_code == PREEMPTED
    saved = torch.load(tmp_path / "checkpoints" / "resume.ckpt", weights_only=True)
    batches = saved["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    assert (saved["global_step"], batches["started"] > batches["processed"]) == (step, due)


def test_ranks_that_validate_a_different_number_of_batches_end_together(tiny_backbone, tmp_path):
    fit_on_two_ranks(tiny_backbone, tmp_path, Preemption(), Ended(tmp_path), max_epochs=2)
    assert (tmp_path / "0.txt").read_text() == "steps 16, validated 8"
    assert (tmp_path / "1.txt").read_text() == "steps 16, validated 6"


EVERY_THREE = {"max_epochs": 2, "limit_train_batches": 6, "val_check_interval": 3, "limit_val_batches": 1.0}


SCORES = "--trainer.callbacks+=callbacks.VQAMetrics"


@pytest.fixture(scope="module")
def validated(config, tmp_path_factory):
    """Validation rows and final weights of an uninterrupted run."""
    return finish_validating(Run(config, tmp_path_factory.mktemp("validated"), **EVERY_THREE))


def finish_validating(run):
    assert run.end_here(SCORES) == 0
    return [row for row in read_metrics(run.home) if "val/average" in row], run.load("last.ckpt")["state_dict"]


WITHIN = (("backward", 2), ("validation", 1))  # a validation within an epoch is due
AT_THE_END = (("backward", 5), ("validation", 2))  # one at the end of an epoch
NONE = (("backward", 6),)
LAST = (("backward", 11), ("validation", 0))


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param((*WITHIN, *LAST), id="within"),
        pytest.param((*WITHIN, *AT_THE_END, *NONE, *LAST), id="everywhere", marks=pytest.mark.slow),
    ],
)
def test_no_validation_is_lost_or_run_twice_wherever_a_run_is_asked_to_end(config, validated, tmp_path, asked):
    rows, weights = validated
    assert [row["step"] for row in rows] == [2, 5, 8, 11]
    run = Run(config, tmp_path / "run", **EVERY_THREE)
    for hook, at in asked:
        assert run.end_here(SCORES, *ask(hook=hook, at=at)) == PREEMPTED
    again, resumed = finish_validating(run)
    assert again == rows
    assert equal(resumed, weights)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(18, 19, 37, 40)])
def test_a_run_that_is_asked_twice_around_the_end_of_an_epoch_trains_no_longer(config, undisturbed, tmp_path, steps):
    run = Run(config, tmp_path / "run")
    for step in steps:  # 19 steps per epoch, without validation
        assert run.end_here(*ask(hook="backward", at=step)) == PREEMPTED
    assert run.end_here() == 0
    assert run.load("last.ckpt")["global_step"] == 76
    assert equal(run.load("last.ckpt")["state_dict"], undisturbed)


def test_a_run_that_is_killed_as_a_validation_begins_has_it_when_it_goes_on(config, validated, tmp_path):
    rows, weights = validated
    run = Run(config, tmp_path / "run", **EVERY_THREE)
    process = run.fork(SCORES, *ask(hook="validation", at=0, number=int(signal.SIGKILL)))
    errors = run.errors(process)
    assert process.exitcode == -signal.SIGKILL, errors
    again, resumed = finish_validating(run)
    assert again == rows
    assert equal(resumed, weights)


def test_a_run_that_is_asked_before_its_first_step_says_that_it_can_go_on(config, tmp_path):
    run = Run(config, tmp_path / "run")
    process = run.fork(*ask(hook="setup", number=int(signal.SIGTERM)))
    errors = run.errors(process)
    assert process.exitcode == PREEMPTED
    assert "nothing to save, the run can be resumed" in errors
    assert not run.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["null", 0, 1])
def test_ranks_that_are_asked_before_the_first_step_do_not_wait_for_each_other(config, tmp_path, rank):
    run = Run(config, tmp_path / "run", devices=2, strategy="ddp")
    status, errors = run.end(*ask(hook="setup", number=int(signal.SIGUSR1), rank=rank))
    assert status == PREEMPTED or (rank == 1 and "RankLost" in errors), errors
    assert rank == 1 or "RankLost" not in errors  # rank 0 notifies the ranks that it has started
    assert "nothing to save, the run can be resumed" in errors
    assert not run.folder.exists()


def test_a_forked_process_can_be_terminated_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    leave_when_asked()
    try:
        process = get_context("fork").Process(target=time.sleep, args=(PATIENCE,))
        process.start()
        process.terminate()
        process.join(PATIENCE / 2)
        assert process.exitcode == -signal.SIGTERM
    finally:
        undo()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("steps", [(4,), pytest.param((1, 4, 7), marks=pytest.mark.slow)])
def test_a_run_that_is_asked_amid_a_step_of_several_batches_takes_it_first(config, tmp_path, steps):
    whole, asked = (Run(config, tmp_path / name, accumulate_grad_batches=4) for name in ("whole", "asked"))
    assert whole.end_here() == 0
    for step in steps:  # in the first batch of a step; the fifth step has three, including the epoch's last
        assert asked.end_here(*ask(hook="backward", at=step)) == PREEMPTED
        assert asked.load("resume.ckpt")["global_step"] == step + 1
    assert asked.end_here() == 0
    assert equal(asked.load("last.ckpt")["state_dict"], whole.load("last.ckpt")["state_dict"])


def test_no_row_of_training_is_lost(config, tmp_path):
    whole, asked = (Run(config, tmp_path / name, log_every_n_steps=1, max_epochs=1) for name in ("whole", "asked"))
    assert whole.end_here() == 0
    for step in (3, 4):
        assert asked.end_here(*ask(hook="backward", at=step)) == PREEMPTED
    assert asked.end_here() == 0
    rows, expected = ([row for row in read_metrics(run.home) if "epoch" in row] for run in (asked, whole))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(19))
    # Lightning repeats other tasks' last losses in a row, if the process has computed them
    assert all(row.items() <= whole_row.items() for row, whole_row in zip(rows, expected, strict=True))
    assert all(any(name.startswith("train/") for name in row) for row in rows)


def kill_and_resume(run, kills):
    draw = random.Random(0)
    for _ in range(kills):
        process = run.fork()
        run.trains(partial(getattr, process, "exitcode"))
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        assert run.load("resume.ckpt")["global_step"] > 0  # complete every time
    return run.finish()


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_goes_on_bit_equal(config, undisturbed, tmp_path):
    assert equal(kill_and_resume(Run(config, tmp_path / "run"), 2), undisturbed)


@pytest.mark.slow
def test_a_run_that_is_killed_fifty_times_goes_on_bit_equal(config, tmp_path):
    whole = Run(config, tmp_path / "whole", max_epochs=16).finish()
    assert equal(kill_and_resume(Run(config, tmp_path / "run", max_epochs=16), 50), whole)


def test_a_full_disk_is_named_and_costs_no_earlier_checkpoint(tmp_path):
    path, io = tmp_path / "resume.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": torch.tensor(1)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as with a quota
    try:
        with pytest.raises(CheckpointNotWritten, match=rf"resume.ckpt was not written: .* the disk of {tmp_path} has"):
            io.save_checkpoint({"step": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert [file.name for file in tmp_path.iterdir()] == ["resume.ckpt"]


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, r"It needs .* MB left\. .*: make room \(or lift the quota\) and resume"),
        (errno.EDQUOT, r"make room \(or lift the quota\)"),
        (errno.EFBIG, r"lift the limit on the size of a file \(ulimit -f\)"),
        (errno.EACCES, r"Permission denied\. Earlier .*: make the folder writable"),
        (errno.EROFS, "Read-only file system.*: write to a disk that is not mounted read-only"),
        (errno.EIO, r"Input/output error\. Earlier .*: see to that and resume"),
    ],
)
def test_a_checkpoint_that_was_not_written_has_its_reason_and_a_cure_for_it(tmp_path, monkeypatch, number, cure):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("vlpet_lightning.atomic_file.os.fsync", fail)
    with pytest.raises(CheckpointNotWritten, match=cure) as error:
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "resume.ckpt")
    assert ("make room" in str(error.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert not list(tmp_path.iterdir())


def test_two_processes_that_write_the_same_checkpoint_do_not_take_it_from_each_other(tmp_path, monkeypatch):
    path, fsync = tmp_path / "resume.ckpt", os.fsync

    def write(step):
        AtomicCheckpointIO().save_checkpoint({"step": step}, path)

    def while_another_writes(file):
        monkeypatch.setattr(os, "fsync", fsync)
        other = get_context("fork").Process(target=write, args=(2,))
        other.start()
        other.join(PATIENCE)
        assert other.exitcode == 0
        assert torch.load(path, weights_only=True) == {"step": 2}
        fsync(file)

    monkeypatch.setattr(os, "fsync", while_another_writes)
    write(1)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["resume.ckpt"]


def test_what_killed_processes_left_of_a_checkpoint_is_cleared_and_what_another_writes_is_not(tmp_path):
    for name, age in (("resume.ckpt.1.part", 4000), ("resume.ckpt.2.part", 10), ("best.ckpt.3.part", 4000)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "resume.ckpt")
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert kept == ["best.ckpt.3.part", "resume.ckpt", "resume.ckpt.2.part"]


def test_a_run_has_the_same_name_after_a_requeue():
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert run_name({"SLURM_JOB_ID": "9"}) == "job_9"
    assert run_name(array) == "job_7_2"
    assert run_name(array | {"VLPET_RUN": "mine"}) == "mine"
    with pytest.raises(ValueError, match="set the environment variable VLPET_RUN"):
        run_name({})


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "é", "a:b", "a\n"])
def test_a_name_that_is_none_for_a_folder_or_wandb_is_refused(name):
    with pytest.raises(ValueError, match=r"VLPET_RUN is .* letters \(A-Z\), digits, \., _ and - alone: set another"):
        run_name({"VLPET_RUN": name})
    assert run_name({"VLPET_RUN": "lr-1e-3_seed.2"}) == "lr-1e-3_seed.2"


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for age, name in enumerate(("last.ckpt", "resume.ckpt", "best-3.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(age, age))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "resume.ckpt")
