"""Reading from failing URLs, with a local server that simulates network failures."""

from __future__ import annotations

import errno
import hashlib
import logging
import zlib

import pytest

from data_modules.store.store import FeatureStoreError
from data_modules.streaming.fetch import BLOCK, Remote, Retries, version_of
from tests.data_modules.streaming.faulty_server import serve

CONTENT = bytes(range(256)) * (BLOCK // 100)  # more than one block
SHA = hashlib.sha256(CONTENT).hexdigest()
QUICK = Retries(attempts=3, first_wait=0.01, timeout=0.4)


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "file").write_bytes(CONTENT)
    with serve(tmp_path / "site") as site:
        yield site


def fetched(site, path, retries=QUICK, name="file", **expected):
    with path.open("w+b") as file:
        Remote(f"{site.url}/{name}", retries).save(file, **expected)
    return path.read_bytes()


@pytest.mark.parametrize("fault", ["hang", "reset", "cut", "short", "wrong", "500", "503"])
def test_a_failure_is_tried_again_and_leaves_no_trace(site, tmp_path, caplog, fault):
    site.fail("file", fault)
    with caplog.at_level(logging.WARNING):
        assert fetched(site, tmp_path / "copy", size=len(CONTENT), sha256=SHA) == CONTENT
    (record,) = caplog.records
    assert f"{site.url}/file: attempt 1 of 3 failed" in record.message
    assert record.exc_info is None


@pytest.mark.parametrize("fault", ["hang", "reset", "cut", "500"])
def test_a_failure_is_noticed_where_neither_size_nor_checksum_is_known(site, tmp_path, fault):
    site.fail("file", fault)
    assert fetched(site, tmp_path / "copy") == CONTENT


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", "nothing arrived for 0.4 s|timeout|Timeout"),
        ("short", f"{len(CONTENT) // 2:,} bytes arrived instead of {len(CONTENT):,}"),
        ("wrong", "its SHA-256 is .* instead of"),
        ("500", "500"),
    ],
)
def test_after_the_last_attempt_one_error_names_url_attempts_reason_and_cure(site, tmp_path, caplog, fault, reason):
    site.fail("file", fault, times=9)
    with pytest.raises(FeatureStoreError, match=reason) as caught:
        fetched(site, tmp_path / "copy", size=len(CONTENT), sha256=SHA)
    assert f"{site.url}/file could not be read in 3 attempts" in str(caught.value)
    assert "Nothing was skipped: check the address and the network" in str(caught.value)
    assert site.gets["/file"] == 3
    assert len(caplog.records) == 2


def test_a_wrong_crc_is_noticed(site, tmp_path):
    remote = Remote(f"{site.url}/file", QUICK)
    with (tmp_path / "copy").open("w+b") as file:
        remote.copy(file, crc=zlib.crc32(CONTENT))
        with pytest.raises(OSError, match=r"its CRC-32 is .* instead of 00000001"):
            remote.copy(file, crc=1)


def test_waits_double_and_half_of_each_is_left_to_chance(site, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("data_modules.streaming.fetch.time.sleep", waits.append)
    site.fail("file", "500", times=9)
    with pytest.raises(FeatureStoreError):
        fetched(site, tmp_path / "copy", Retries(attempts=6, first_wait=8, timeout=1))
    assert all(2**n * 4 <= wait <= 2**n * 8 for n, wait in enumerate(waits))
    assert len(waits) == 5


@pytest.mark.parametrize(("status", "cure"), [("403", "credentials"), ("404", "check the address")])
def test_what_no_attempt_would_change_is_not_tried_again(site, tmp_path, status, cure):
    site.fail("file", status)
    with pytest.raises(FeatureStoreError, match=f"cannot be read.*{cure}"):
        fetched(site, tmp_path / "copy")
    assert site.gets["/file"] == 1


def test_nobody_listening_is_tried_again_and_then_one_error(tmp_path, caplog):
    with serve(tmp_path) as site:
        pass
    with pytest.raises(FeatureStoreError, match=r"could not be read in 3 attempts; the last one: .*onnect"):
        Remote(f"{site.url}/file", QUICK).read()


def test_a_filesystem_that_does_not_answer_is_left_behind(tmp_path, monkeypatch):
    import threading

    over = threading.Event()
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.info", lambda *_, **__: over.wait(10))
    with pytest.raises(FeatureStoreError, match=r"in 2 attempts; the last one: nothing arrived for 0.1 s"):
        Remote(str(tmp_path), Retries(attempts=2, first_wait=0, timeout=0.1)).info()
    over.set()


def test_a_missing_package_is_named_at_once(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(FeatureStoreError, match=r"gs://bucket/file cannot be read.*gcsfs.*: install what it names"):
        Remote("gs://bucket/file", QUICK).read()


def test_an_unknown_protocol_is_refused_at_once():
    with pytest.raises(FeatureStoreError, match="Protocol not known: ftpx"):
        Remote("ftpx://host/file", QUICK).read()


def test_a_full_disk_is_not_a_failure_of_the_network(site):
    class Full:
        def seek(self, place):
            pass

        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Remote(f"{site.url}/file", QUICK).save(Full())
    assert site.gets["/file"] == 1


def test_absent_files_are_none_and_a_local_path_is_a_url_too(site, tmp_path):
    for url in (site.url, str(tmp_path / "site"), f"file://{tmp_path}/site"):
        assert Remote(url, QUICK).find().keys() == {"file"}
        assert (Remote(url, QUICK) / "file").read() == CONTENT
        assert (Remote(url, QUICK) / "file").info()["size"] == len(CONTENT)
        assert (Remote(url, QUICK) / "other").read() is None
        assert (Remote(url, QUICK) / "other").info() is None
        assert (Remote(url, QUICK) / "other").find() == {}


def test_two_versions_of_a_file_on_the_hub_differ_also_where_it_is_small():
    small = {"name": "a.json", "size": 5, "type": "file", "lfs": None}  # as in HfFileSystem
    assert version_of(small | {"blob_id": "1"}) != version_of(small | {"blob_id": "2"})
