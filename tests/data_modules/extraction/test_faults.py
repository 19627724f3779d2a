"""Faults during extraction: kills at any moment, ended processes, files repaired between attempts."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from data_modules.extraction import media
from data_modules.extraction.commands import extract_images
from data_modules.extraction.extraction import STATISTICS, ExtractionError, _is_of_the_machine
from data_modules.store.resumable import ResumableStore
from data_modules.store.store import META, FeatureStore, FeatureStoreError
from tests.data_modules.extraction.tiny_media import RESNET, picture
from vlpet_lightning.vision.encoders import Encoder


@pytest.fixture
def images(tmp_path):
    for number in range(40):
        picture(tmp_path / "images" / f"{number:02d}.jpg", number)
    damage(tmp_path / "images" / "07.jpg")
    return tmp_path / "images"


def damage(path):
    path.write_bytes(path.read_bytes()[:-400])
    with Image.open(path) as image:
        image.verify()  # found only by decoding


def images_to(source, out, **changes):
    options = {"model": RESNET, "pretrained": None, "pool": None, "device": "cpu", "shard_rows": 8, "batch_size": 4}
    extract_images(source=source, out=out, **(options | changes))


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(parts, monkeypatch, call):
    left, write = [parts], ResumableStore.write

    def counted(self, *words, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableStore, "write", counted)
        with pytest.raises(KeyboardInterrupt):
            call()


def _extract_slowly(source, out):
    encode = Encoder.__call__

    def slow(self, pixels):
        time.sleep(0.1)  # more moments, and an idle machine must not finish before it is killed twice
        return encode(self, pixels)

    Encoder.__call__ = slow
    images_to(source, out)


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_no_finished_shard_and_no_byte(images, tmp_path):
    images_to(images, tmp_path / "whole")
    out = tmp_path / "store"
    rng = random.Random(0)
    killed, finished = 0, {}
    for attempt in range(40):
        process = multiprocessing.get_context("fork").Process(target=_extract_slowly, args=(images, out))
        process.start()
        process.join(rng.uniform(0.2, 1.2) if attempt < 39 else 120)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        for record, inode in finished.items():  # written once, by one of the attempts
            assert record.with_suffix(".npy").stat().st_ino == inode
        finished |= {record: record.with_suffix(".npy").stat().st_ino for record in out.glob("shard-*.json")}
        if process.exitcode == 0:
            break
        if out.exists() and not (out / META).exists():
            with pytest.raises(FeatureStoreError, match="cut short"):
                FeatureStore(out)
    assert process.exitcode == 0
    assert killed >= 2
    assert finished
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.slow
def test_workers_and_processes_change_no_byte_also_past_unreadable_files(images, tmp_path):
    images_to(images, tmp_path / "one")
    images_to(images, tmp_path / "many", workers=1, processes=2)
    assert len(FeatureStore(tmp_path / "one")) == 39
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_a_run_that_goes_on_keeps_the_statistics_of_its_beginning(images, tmp_path, monkeypatch):
    stop_after(1, monkeypatch, lambda: images_to(images, tmp_path / "store"))
    before = (tmp_path / "store" / STATISTICS).read_bytes()
    picture(images / "30.jpg", 99)  # one of the shards that they belong to
    images_to(images, tmp_path / "store")
    assert (tmp_path / "store" / STATISTICS).read_bytes() == before
    images_to(images, tmp_path / "other")
    assert (tmp_path / "other" / STATISTICS).read_bytes() != before


def test_a_file_that_is_repaired_before_the_run_goes_on_is_read(images, tmp_path, monkeypatch):
    stop_after(2, monkeypatch, lambda: images_to(images, tmp_path / "store"))
    assert not (tmp_path / "store" / META).exists()
    picture(images / "07.jpg", 7)
    images_to(images, tmp_path / "store")
    assert len(FeatureStore(tmp_path / "store")) == 40
    assert not (tmp_path / "store" / "unreadable.txt").exists()


def test_a_run_under_newer_libraries_goes_on_and_names_both(images, tmp_path, monkeypatch):
    stop_after(1, monkeypatch, lambda: images_to(images, tmp_path / "store"))
    monkeypatch.setattr("data_modules.extraction.extraction.versions", lambda *names: "torch 9")
    images_to(images, tmp_path / "store")
    assert FeatureStore(tmp_path / "store").meta["extractor"]["versions"].endswith("; torch 9")


@pytest.mark.slow  # the next one is of an error in a process, too
def test_an_error_in_a_process_is_the_commands_error(images, tmp_path):
    (tmp_path / "store" / "shard-00001.npy.part").mkdir(parents=True)  # not writable
    with pytest.raises(FeatureStoreError, match=r"shard-00001\.npy cannot be written"):
        images_to(images, tmp_path / "store", processes=2)


@pytest.mark.slow
def test_a_process_that_is_killed_is_the_commands_error(images, tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    runner = context.Process(target=_tell_error, args=(images, tmp_path / "store", told))
    runner.start()
    while not (found := _encoders_of(runner.pid)):
        assert runner.is_alive()
        time.sleep(0.01)
    os.kill(found[0], signal.SIGKILL)
    message = told.get()
    runner.join()
    assert "a process was ended by signal 9, perhaps for want of memory: give fewer --processes" in message


def _tell_error(source, out, told):
    try:
        images_to(source, out, processes=2)
    except ExtractionError as error:
        told.put(str(error))
    else:
        told.put("no error")


def _encoders_of(pid):
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and "spawn_main" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def test_a_device_without_room_says_which_setting_to_lower(images, tmp_path, monkeypatch):
    encode = Encoder.__call__

    def full(self, pixels):
        if len(pixels) == 8:
            raise torch.OutOfMemoryError("full")
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "__call__", full)
    with pytest.raises(ExtractionError, match="cpu has too little memory: give a --batch_size below 8"):
        images_to(images, tmp_path / "store", batch_size=8)
    images_to(images, tmp_path / "store", batch_size=4)
    assert len(FeatureStore(tmp_path / "store")) == 39


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (OSError(errno.EMFILE, "Too many open files"), 0),
        (OSError(errno.EMFILE, "Too many open files"), 1),
        (OSError(errno.EIO, "Input/output error"), 0),
        (MemoryError(), 0),
    ],
)
def test_an_image_is_not_left_out_because_the_machine_was_busy(images, tmp_path, monkeypatch, error, workers):
    read = media.read_image

    def busy(path, **options):
        if path.stem == "30":
            raise error
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(media, "read_image", busy)
        reason = error.strerror if isinstance(error, OSError) else "MemoryError"
        with pytest.raises(ExtractionError, match=rf"30\.jpg cannot be read now \({reason}\).* same command"):
            images_to(images, tmp_path / "s", workers=workers)
    images_to(images, tmp_path / "s", workers=workers)
    assert "30" in FeatureStore(tmp_path / "s").ids


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_what_ffmpeg_says_of_a_damaged_video_is_of_the_machine_only_if_the_file_cannot_be_read(tmp_path, number):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    error = av.error.FFmpegError(number, "what FFmpeg says")
    assert not _is_of_the_machine(error, tmp_path / "clip.mp4")
    assert _is_of_the_machine(error, tmp_path / "gone.mp4")
