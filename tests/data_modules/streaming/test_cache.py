"""The shard cache: bounded, shared by processes, and consistent after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from data_modules.store.store import FeatureStoreError
from data_modules.streaming.cache import LOCK, ShardCache, Slot, locked

SIZE = 1000


def slot(cache, number, fill=None, size=SIZE, scratch=0):
    def write(file, beside):
        file.write(bytes([number]) * size)

    return Slot(cache.folder / "store.streamed" / f"shard-{number:05d}.npy", size, lambda: scratch, fill or write)


def read(cache, number, **options):
    with cache.open(slot(cache, number, **options)) as file:
        return file.read()


def held(cache):
    return sorted(int(path.stem[-5:]) for path in cache.folder.glob("store.streamed/*.npy"))


def taken(folder):
    """Return the total size of a cache."""
    found = 0
    for path in folder.glob("store.streamed/shard-*"):
        with suppress(FileNotFoundError):  # removed since it was listed
            found += path.stat().st_size if path.suffix != LOCK else 0
    return found


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 3 * SIZE)


def test_a_shard_is_fetched_once_and_then_found(cache):
    calls = []

    def fill(file, beside):
        calls.append(1)
        file.write(b"x" * SIZE)

    assert read(cache, 0, fill=fill) == read(cache, 0, fill=fill) == b"x" * SIZE
    assert len(calls) == 1


def test_the_shard_used_longest_ago_makes_room(cache):
    for number in (0, 1, 2, 0, 3):
        assert read(cache, number) == bytes([number]) * SIZE
        time.sleep(0.01)  # the file system's clock for access times
    assert held(cache) == [0, 2, 3]


def test_who_has_a_shard_open_goes_on_reading_it_when_it_is_removed(cache):
    with cache.open(slot(cache, 0)) as file:
        for number in (1, 2, 3):
            read(cache, number)
        assert 0 not in held(cache)
        assert file.read() == bytes(SIZE)


def test_the_bound_holds_at_every_moment_with_several_threads_and_scratch(cache):
    most = []

    def fill(file, beside):
        for _ in range(SIZE // 100):
            file.write(b"x" * 100)
            beside.write(b"y" * 50)
            file.flush()
            beside.flush()
            most.append(settled())

    def settled():
        """Count again above the bound: a file may be removed after it was counted, before another grows."""
        for _ in range(50):
            if (found := taken(cache.folder)) <= cache.max_bytes:
                break
            time.sleep(0.002)
        return found

    def work(first):
        for number in range(first, first + 8):
            read(cache, number, fill=fill, scratch=500)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert SIZE < max(most) <= cache.max_bytes
    assert not list(cache.folder.glob("store.streamed/*.scratch"))


def test_a_shard_that_others_fetch_or_that_has_no_room_is_left_to_them_by_who_does_not_wait(cache):
    started, go_on = threading.Event(), threading.Event()

    def slow(file, beside):
        started.set()
        go_on.wait(10)
        file.write(b"x" * 3 * SIZE)

    thread = threading.Thread(target=read, args=(cache, 0), kwargs={"fill": slow, "size": 3 * SIZE})
    thread.start()
    started.wait(10)
    assert cache.open(slot(cache, 0, size=3 * SIZE), wait=False) is None  # locked
    assert cache.open(slot(cache, 1), wait=False) is None  # no space
    go_on.set()
    assert read(cache, 1) == b"\1" * SIZE  # waits for space
    thread.join()


def test_a_shard_that_cannot_be_fetched_leaves_nothing_behind(cache):
    def fill(file, beside):
        file.write(b"x")
        raise FeatureStoreError("gone")

    with pytest.raises(FeatureStoreError, match="gone"):
        read(cache, 0, fill=fill)
    assert taken(cache.folder) == 0
    assert read(cache, 0) == bytes(SIZE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_says_what_to_do(cache):
    def fill(file, beside):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(FeatureStoreError, match=r"No space left on device.*lower data.init_args.stream.max_gb"):
        read(cache, 0, fill=fill)
    assert taken(cache.folder) == 0


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureStoreError, match=r"cannot be written.*set data.init_args.stream.cache"):
        ShardCache(tmp_path / "file" / "cache", SIZE)


def test_a_shard_larger_than_the_cache_is_refused(cache):
    with pytest.raises(FeatureStoreError, match=r"shard-00000.npy needs 0.000 GB.*raise data.init_args.stream.max_gb"):
        read(cache, 0, size=SIZE, scratch=3 * SIZE)


def test_stores_of_the_user_s_own_in_the_same_folder_are_left_alone(cache):
    own = cache.folder / "COCO" / "shard-00000.npy"
    own.parent.mkdir()
    own.write_bytes(bytes(10 * SIZE))
    for number in range(4):
        read(cache, number)
    assert own.stat().st_size == 10 * SIZE
    assert len(held(cache)) == 3


def test_a_shard_of_another_size_is_fetched_again(cache):
    read(cache, 0)
    slot(cache, 0).path.write_bytes(b"short")
    assert read(cache, 0) == bytes(SIZE)


def fetch_all(folder, log):
    """Run in each of two processes."""
    cache = ShardCache(folder, 10 * SIZE)
    for number in range(10):

        def fill(file, beside, number=number):
            with log.open("a") as lines:
                lines.write(f"{number}\n")
            time.sleep(0.02)
            file.write(bytes([number]) * SIZE)

        assert read(cache, number, fill=fill) == bytes([number]) * SIZE


def test_two_processes_fetch_each_shard_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "cache", tmp_path / "log")
    processes = [context.Process(target=fetch_all, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(10))


FETCHING = """
import sys, time
from pathlib import Path
from tests.data_modules.streaming.test_cache import ShardCache, read

def fill(file, beside):
    file.write(b"x" * 999)
    beside.write(b"y")
    file.flush()
    print("fetching", flush=True)
    time.sleep(60)

read(ShardCache(Path(sys.argv[1]), 3000), 0, fill=fill, scratch=500)
"""


@pytest.fixture
def killed(cache):
    """Return the cache after a process was killed while fetching shard 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", FETCHING, str(cache.folder)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"fetching\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert taken(cache.folder) == SIZE + 500
    return cache


def test_what_a_killed_process_began_does_not_read_as_whole_and_is_fetched_again(killed):
    assert held(killed) == []
    assert read(killed, 0) == bytes(SIZE)
    assert taken(killed.folder) == SIZE


def test_what_a_killed_process_began_makes_room_for_others(killed):
    for number in (1, 2, 3):
        read(killed, number)
    assert held(killed) == [1, 2, 3]
    assert taken(killed.folder) == 3 * SIZE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_while_a_lock_is_held_does_not_keep_it(tmp_path):
    mine, theirs = os.pipe()
    with locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            os.read(mine, 1)
            os._exit(0)
    with locked(tmp_path / "lock", wait=False) as held:
        assert held
    os.write(theirs, b"x")
    os.waitpid(child, 0)
