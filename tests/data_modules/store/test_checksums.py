"""Checksums that are remembered, and those of stores without reading their shards."""

from __future__ import annotations

import hashlib
import json

import pytest

from data_modules.store import checksums
from data_modules.store.checksums import describe_store, file_checksums
from data_modules.store.store import FeatureStore
from tests.data_modules.tiny_data import write_features


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Names of the files that were read, with an empty memory and a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "_known", {})
    monkeypatch.setattr(checksums, "WORTH_KEEPING", 4)
    names = []
    real = checksums.checksum

    def counted(path):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(checksums, "checksum", counted)
    return names


def test_a_file_is_read_again_only_after_it_has_changed(tmp_path, read, monkeypatch):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"12345")
    small.write_bytes(b"1")
    first = file_checksums([large, small])
    assert first == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (large, small)}
    assert file_checksums(iter([small, large])) == first
    assert sorted(read) == ["large", "small"]
    monkeypatch.setattr(checksums, "_known", {})  # as in another process, which remembers large files only
    assert file_checksums([large, small]) == first
    assert sorted(read) == ["large", "small", "small"]
    large.write_bytes(b"54321")  # of the same size
    assert file_checksums([large])[large] == hashlib.sha256(b"54321").hexdigest()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": [["x"], 1]}'])
def test_a_damaged_memory_is_no_error(tmp_path, read, content):
    file = tmp_path / "cache" / "vlpet_lightning" / "checksums.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    large = tmp_path / "large"
    large.write_bytes(b"12345")
    assert file_checksums([large])[large] == hashlib.sha256(b"12345").hexdigest()
    assert list(json.loads(file.read_text())) == [str(large)]


def test_a_store_is_known_by_its_contents_and_not_by_its_place(tmp_path):
    for name, ids in (("one", ["a", "b"]), ("same", ["a", "b"]), ("other", ["a", "c"])):
        write_features(tmp_path / name, ids)
    sums = [describe_store(FeatureStore(tmp_path / name))["checksum"] for name in ("one", "same", "other")]
    assert sums[0] == sums[1] != sums[2]
    (shard,) = (tmp_path / "one").glob("shard-*.npy")
    shard.unlink()  # no shard is read
    assert describe_store(FeatureStore(tmp_path / "one"))["checksum"] == sums[0]
