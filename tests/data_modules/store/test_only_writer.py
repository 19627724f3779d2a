"""A store has one writer at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_modules.store.resumable import Part, ResumableStore, Rows, fill
from data_modules.store.store import FeatureStore
from vlpet_lightning import folder_lock
from vlpet_lightning.folder_lock import NAME, FolderInUse


def store(path, read=None):
    rows = [Rows(["a", "b"], np.ones((2, 1, 3), dtype=np.float16))]
    return ResumableStore(path, [Part("part", 1, 2, read or (lambda: rows))], tokens=1, dim=3, extractor={"model": "m"})


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    seen = []

    def read():
        with pytest.raises(FolderInUse, match=r"is being written by process .* or choose another --out"):
            fill([store(tmp_path / "s")], workers=1)
        seen.append(json.loads((tmp_path / "s" / NAME).read_text())["pid"])
        yield Rows(["a", "b"], np.ones((2, 1, 3), dtype=np.float16))

    fill([store(tmp_path / "s", read)], workers=1)
    assert len(seen) == 1
    assert FeatureStore(tmp_path / "s").ids == ["a", "b"]
    assert not (tmp_path / "s" / NAME).exists()


def test_what_another_writer_finished_in_the_meantime_is_not_made_again(tmp_path):
    def read():
        raise AssertionError("made again")
        yield

    late = store(tmp_path / "s", read)
    fill([store(tmp_path / "s")], workers=1)
    fill([late], workers=1)
    assert late.complete


def test_the_lock_of_a_writer_that_was_killed_at_its_end_is_removed(tmp_path):
    fill([store(tmp_path / "s")], workers=1)
    dead = {"pid": 1, "start": "no such", "token": "x", "machine": folder_lock._machine()}
    (tmp_path / "s" / NAME).write_text(json.dumps(dead))
    fill([store(tmp_path / "s")], workers=1)
    assert not (tmp_path / "s" / NAME).exists()


def test_a_complete_store_is_not_locked(tmp_path):
    fill([store(tmp_path / "s")], workers=1)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "s").iterdir())
    fill([store(tmp_path / "s")], workers=1)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "s").iterdir()) == before
