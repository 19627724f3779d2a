"""``data verify`` and ``data info``, and lazy opening of stores."""

from __future__ import annotations

import numpy as np
import pytest

from data_modules.store.store import FeatureStore, FeatureStoreError
from data_modules.store.verify import info, verify
from data_modules.store.writer import FeatureWriter
from vlpet_lightning.__main__ import run

NAMES = [f"image{number}" for number in range(7)]


@pytest.fixture
def root(tmp_path):
    for name in ("COCO", "VG"):
        with FeatureWriter(
            tmp_path / "features" / name, tokens=4, dim=2, shard_bytes=3 * 16, extractor={"model": "RN101", "pool": 2}
        ) as writer:
            writer.add(NAMES, np.arange(56, dtype=np.float16).reshape(7, 4, 2))
    return tmp_path


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_whole_stores_are_counted(root, capsys):
    assert run(["data", "verify", f"--store={root}"]) == 0
    assert "whole: 2 stores, 10 files" in capsys.readouterr().out


def test_every_damaged_shard_is_named_with_its_ids(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    flip(root / "features/COCO/shard-00001.npy")
    (root / "features/VG/shard-00002.npy").unlink()
    with pytest.raises(FeatureStoreError, match="2 of 10 files are damaged, 4 images are lost"):
        verify(store=root, ids=tmp_path / "lost.txt")
    shown = capsys.readouterr().out
    assert "shard-00001.npy" in shown
    assert "was changed since it was written" in shown
    assert "image3, image4, image5" in shown
    assert "is missing" in shown
    assert (tmp_path / "lost.txt").read_text().split() == ["image3", "image4", "image5", "image6"]


def test_damaged_ids_do_not_hide_a_damaged_shard(root):
    (root / "features/COCO/ids.npy").write_bytes(b"")
    (root / "features/COCO/shard-00000.npy").write_bytes(b"")
    with pytest.raises(FeatureStoreError, match="2 of 5 files are damaged"):
        verify(store=root / "features/COCO")


def test_info_shows_counts_and_extractor(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    info(store=root)
    shown = capsys.readouterr().out
    for word in ("COCO", "VG", "7", "2x2", "model RN101"):
        assert word in shown


def test_a_long_record_of_an_extractor_stands_below_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    record = {"model": "RN101", "pretrained": "openai", "pool": None, "note": "a word " * 30, "sha256": "0" * 90}
    with FeatureWriter(tmp_path / "COCO", tokens=4, dim=2, extractor=record) as writer:
        writer.add(["a"], np.ones((1, 4, 2), dtype=np.float16))
    info(store=tmp_path)
    shown = capsys.readouterr().out.splitlines()
    table, record = "\n".join(shown[:7]), "".join(shown[7:])
    assert all(word in table for word in ("RN101", "openai"))
    assert "a word" not in table
    assert "a word" in record
    assert record.count("0") >= 90
    assert len(shown) < 20


def test_no_store_is_an_error(tmp_path):
    with pytest.raises(FeatureStoreError, match="is no feature store"):
        info(store=tmp_path)


def test_opening_reads_no_shard_and_finding_reads_only_the_index(root, monkeypatch):
    read = []
    checked = FeatureStore._checked  # every file is checked before it is mapped
    monkeypatch.setattr(
        FeatureStore, "_checked", lambda self, entry: read.append(entry["file"]) or checked(self, entry)
    )
    store = FeatureStore(root / "features/COCO")
    assert (len(store), read) == (7, [])
    store.rows(["image3"])
    assert read == ["ids.npy", "order.npy"]
    store.gather(np.array([4]))
    assert read == ["ids.npy", "order.npy", "shard-00001.npy"]
