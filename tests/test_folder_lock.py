"""One owner a folder: refusals, owners that were killed, and owners on other machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlpet_lightning import folder_lock
from vlpet_lightning.folder_lock import NAME, FolderInUse, FolderLock, FolderNotWritable, locked_folder

HOLD = """
import sys, time
from pathlib import Path
from vlpet_lightning.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1]), "the test", "stop"):
    print("held", flush=True)
    time.sleep(120)
"""


def locked(folder):
    return locked_folder(folder, "the test", "use another folder")


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    folder = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert process.stdout.readline() == "held\n"
    yield process, folder
    process.kill()
    process.wait()


def foreign(folder, **changes):
    """A lock as a process on another machine writes it."""
    folder.mkdir(exist_ok=True)
    owner = {"host": "node17", "pid": 4711, "since": "2026-01-02T03:04:05+00:00", "token": "x", "machine": "node17 b"}
    (folder / NAME).write_text(json.dumps(owner | changes))
    return folder / NAME


def test_the_lock_names_its_owner_while_it_is_held_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        owner = json.loads((folder / NAME).read_text())
        assert owner["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_stays(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_second_process_is_refused_and_told_who_and_since_when(holder):
    process, folder = holder
    before = (folder / NAME).read_bytes()
    message = rf"run is being written by process {process.pid} on \S+ since 20\S+: wait .* or use another folder"
    with pytest.raises(FolderInUse, match=message), locked(folder):
        pass
    assert (folder / NAME).read_bytes() == before


def test_an_owner_that_was_killed_is_replaced_at_once(holder):
    process, folder = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / NAME).exists()
    start = time.monotonic()
    with locked(folder):
        assert json.loads((folder / NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - start < folder_lock.STALE


def test_a_process_id_that_was_given_again_is_not_the_owner(tmp_path):
    foreign(tmp_path, machine=folder_lock._machine(), pid=os.getpid(), start="1")
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["token"] != "x"


def test_a_stale_lock_of_another_machine_is_taken_over(tmp_path):
    path = foreign(tmp_path)
    long_ago = time.time() - folder_lock.STALE - 5
    os.utime(path, (long_ago, long_ago))
    with locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_machine_that_died_a_moment_ago_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder_lock, "STALE", 0.5)
    monkeypatch.setattr(folder_lock, "POLL", 0.05)
    path = foreign(tmp_path)
    with locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "belongs to process 4711 on node17 since 2026-01-02" in capsys.readouterr().err


def test_another_machine_with_a_heartbeat_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "POLL", 0.0)
    path = foreign(tmp_path)
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: os.utime(path, (time.time() + 1, time.time() + 1)))
    with pytest.raises(FolderInUse, match="process 4711 on node17"), locked(tmp_path):
        pass


def test_the_owner_refreshes_the_time_of_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "HEARTBEAT", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_a_lock_that_a_kill_left_unfinished_is_no_owner(tmp_path):
    (tmp_path / NAME).write_text('{"host": "nod')
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_released_lock_of_another_owner_stays(tmp_path):
    lock = FolderLock(tmp_path, "the test", "stop")
    lock.acquire()
    foreign(tmp_path)
    lock.release()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == 4711


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FolderNotWritable, match=r"the test cannot write to .*file/run \(Not a directory\)"):
        FolderLock(tmp_path / "file" / "run", "the test", "stop").acquire()


def test_many_that_claim_at_once_have_one_winner(tmp_path):
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    root = Path(__file__).parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(words, cwd=root, **pipes) for _ in range(4)]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.kill()
    errors = [process.communicate()[1] for process in processes if process not in running]
    assert len(running) == 1
    assert all("FolderInUse" in error for error in errors)
