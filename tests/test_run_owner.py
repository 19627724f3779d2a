"""A run's folder has one owner: a second start and a test are refused; a killed owner does not block the next start."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from shutil import which
from tempfile import gettempdir

import pytest
import torch

from tests.requeued import PATIENCE, ROOT, Run, tiny_config
from vlpet_lightning.__main__ import run as run_here
from vlpet_lightning.folder_lock import NAME, FolderInUse
from vlpet_lightning.loggers import read_metrics


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_backbone):
    """The shipped experiment on a tiny world."""
    return tiny_config(tmp_path_factory.mktemp("world"), tiny_backbone)


def test_a_second_fit_and_a_test_are_refused_and_a_killed_owner_is_replaced_at_once(config, tmp_path):
    whole, run = (Run(config, tmp_path / name, max_epochs=1, log_every_n_steps=1) for name in ("whole", "run"))
    weights = whole.finish()
    first = run.fork("--trainer.callbacks+=tests.requeued.Slow")
    run.trains(partial(getattr, first, "exitcode"))
    status, errors = run.end()  # started twice
    assert status == 1
    assert f"FolderInUse: {run.home} is being written by process {first.pid} on" in errors.replace("\n", " ")
    words = [word for word in run.words if word != "auto"][:-1]
    with pytest.raises(FolderInUse, match=f"process {first.pid} on"):
        run_here(["test", *words, "--ckpt_path", str(run.folder / "resume.ckpt")])
    assert not (run.home / "test.yaml").exists()
    assert first.exitcode is None
    first.kill()
    first.join(PATIENCE)
    assert (run.home / NAME).exists()
    resumed = run.finish()
    assert not (run.home / NAME).exists()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    steps = [row["step"] for row in read_metrics(run.home) if any(name.endswith("/loss") for name in row)]
    assert len(steps) >= len(set(steps)) == len({row["step"] for row in read_metrics(whole.home)})


@pytest.mark.skipif(os.getuid() != 0 or which("setpriv") is None, reason="needs root, to run as another user")
def test_a_folder_that_another_user_may_not_write_is_one_error_at_the_start(config, tmp_path):
    run = Run(config, tmp_path / "run")
    for path in {*tmp_path.parents, *config.parents}:
        if path != Path(gettempdir()) and path.is_relative_to(gettempdir()):
            path.chmod(0o755)
    subprocess.run(["chmod", "-R", "a+rX", str(config.parent), str(tmp_path)], check=True)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vlpet_lightning') is None)"
    if subprocess.run([*user, sys.executable, "-c", found], cwd=ROOT, capture_output=True).returncode != 0:
        pytest.skip("another user cannot read this folder")
    ran = subprocess.run(
        [*user, sys.executable, "-m", "vlpet_lightning", "fit", *run.words],
        env=os.environ | {"VLPET_RUN": "one", "HOME": str(home), "XDG_CACHE_HOME": str(home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert f"FolderNotWritable: the run cannot write to {run.home} (Permission denied)" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [path.name for path in run.home.parents[1].iterdir()] == ["trainer.yaml"]


def test_a_run_that_fails_before_it_begins_leaves_no_folder(config, tmp_path):
    run = Run(config, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run.end_here(f"--data.init_args.root={tmp_path / 'nowhere'}")
    assert not run.home.exists()
