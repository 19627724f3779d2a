"""Conversion of the published parquet features to stores, with interruptions."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch

from data_modules.convert import hub as module
from data_modules.convert.hub import convert_hub
from data_modules.convert.trees import convert_h5
from data_modules.store import resumable
from data_modules.store.pooling import are_finite, pool_rows
from data_modules.store.resumable import Part, ResumableStore, Rows, fill
from data_modules.store.store import FeatureStore, FeatureStoreError
from data_modules.store.writer import FeatureWriter
from tests.data_modules.convert.tiny_hub import (
    ANNOTATIONS,
    DIM,
    ROWS,
    TOKENS,
    features,
    ids,
    make_hub,
    part,
    table,
    write_h5,
    write_manifest,
    write_shard,
)
from vlpet_lightning.__main__ import run
from vlpet_lightning.backbones.visual import pool_grid


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(published, tmp_path):
    return shutil.copytree(published, tmp_path / "hub")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def convert(source, out, **options):
    convert_hub(source=str(source), out=out, **options)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pooled(rows, grid):
    return pool_grid(torch.from_numpy(rows).float(), grid).half().numpy()


@pytest.mark.parametrize("grid", [1, 2, 3, 6, 7, None])
@pytest.mark.parametrize("signed", [False, True])
def test_pooling_is_the_models(grid, signed):
    rows = features(2, signed=signed)
    assert np.array_equal(pool_rows(rows, grid), pooled(rows, grid))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_what_is_not_finite_is_found(value):
    rows = features(2)
    rows[1, 3, 4] = value
    assert are_finite(rows).tolist() == [True, False]


def test_every_way_gives_the_same_features(published, tmp_path, out):
    names = [id for shard in range(3) for id in ids("COCO", shard)]
    rows = np.concatenate([features(ROWS, seed) for seed in range(3)])
    convert(published, out)
    write_h5(tmp_path / "tree", names, rows)
    convert_h5(source=tmp_path / "tree", out=tmp_path / "h5", shard_rows=4)
    with FeatureWriter(tmp_path / "direct", tokens=36, dim=DIM) as writer:
        writer.add(names, pooled(rows, 6))
    for path in (out / "features" / "COCO", tmp_path / "h5", tmp_path / "direct"):
        store = FeatureStore(path)
        assert (len(store), store.tokens, store.dim, store.lengths(np.arange(15))) == (15, 36, DIM, None)
        assert store.gather(store.rows(names)).tobytes() == pooled(rows, 6).tobytes()
    assert len(FeatureStore(out / "features" / "nlvr")) == ROWS
    assert {name: (out / "annotations" / name).read_bytes() for name in ANNOTATIONS} == ANNOTATIONS


def test_the_grid_is_kept_on_request(published, out):
    assert (
        run(["data", "convert", "hub", f"--source={published}", f"--out={out}", "--pool=null", "--datasets=nlvr"]) == 0
    )
    store = FeatureStore(out / "features" / "nlvr")
    assert np.array_equal(store.gather(np.arange(ROWS)), features(ROWS, 3))
    assert store.meta["extractor"]["pool"] is None
    assert not (out / "features" / "COCO").exists()


def test_a_remote_source_is_read_as_a_local_one(published, out, tmp_path):
    memory = fsspec.filesystem("memory")
    for name, content in tree(published).items():
        memory.pipe(f"/hub/{name}", content)
    try:
        convert("memory://hub", out)
    finally:
        memory.rm("/hub", recursive=True)
    convert(published, tmp_path / "local", workers=1)
    assert tree(out) == tree(tmp_path / "local")


def test_a_network_that_fails_is_one_clear_error_and_the_next_attempt_goes_on(published, out, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    for name, content in tree(published).items():
        memory.pipe(f"/hub/{name}", content)
    opened = []
    open_file = type(memory).open

    def failing(self, path, *args, **kwargs):
        opened.append(path)
        if path.endswith("COCO/data_clip_RN101_att/part-00001.parquet") and opened.count(path) == 2:
            raise TimeoutError("timed out")  # at the first look at its schema
        return open_file(self, path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "open", failing)
    try:
        with pytest.raises(
            FeatureStoreError, match=r"part-00001\.parquet .*timed out.* then give the same command again"
        ):
            convert("memory://hub", out, workers=1)
        first = (out / "features/COCO/shard-00000.npy").stat().st_ino
        convert("memory://hub", out, workers=1)
    finally:
        memory.rm("/hub", recursive=True)
    convert(published, tmp_path / "local")
    assert tree(out) == tree(tmp_path / "local")
    assert (out / "features/COCO/shard-00000.npy").stat().st_ino == first


def test_a_download_can_be_converted_where_it_lies(hub, published, out):
    convert(hub, hub, datasets="nlvr")
    convert(published, out, datasets="nlvr")
    assert (hub / "features/nlvr/meta.json").read_bytes() == (out / "features/nlvr/meta.json").read_bytes()


def test_what_is_there_is_left_as_it_is(published, out, capsys):
    convert(published, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    convert(published, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(FeatureStoreError, match="complete store of 5 rows, made from another source or in another way"):
        convert(published, out, pool=None, datasets="nlvr")


def _convert_slowly(source, out):
    pool = module.pool_rows

    def slow_pool(*arguments):
        time.sleep(0.005)  # an idle machine must not finish before it is killed twice
        return pool(*arguments)

    module.pool_rows = slow_pool
    module.BATCH = 2  # more moments
    convert(source, out, workers=1)


def test_a_kill_at_any_moment_costs_no_finished_shard(tmp_path, out):
    source = make_hub(tmp_path / "hub", rows=40)
    convert(source, tmp_path / "whole")
    rng = random.Random(0)
    killed = 0
    finished = {}
    for attempt in range(40):
        process = multiprocessing.get_context("fork").Process(target=_convert_slowly, args=(source, out))
        process.start()
        # longer with each attempt, so that a busy machine finishes a part, too
        process.join(rng.uniform(0.02, 0.25) * 1.1**attempt if attempt < 39 else 120)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        for record, shard in finished.items():  # written once, by one of the attempts
            now = record.with_suffix(".npy").stat()
            assert (now.st_ino, now.st_mtime_ns) == (shard.st_ino, shard.st_mtime_ns)
        finished |= {record: record.with_suffix(".npy").stat() for record in out.glob("features/*/shard-*.json")}
        if process.exitcode == 0:
            break
        for folder in out.glob("features/*"):  # an incomplete store is never read as complete
            if not (folder / "meta.json").exists():
                with pytest.raises(FeatureStoreError, match="cut short"):
                    FeatureStore(folder)
    assert process.exitcode == 0
    assert killed >= 2
    assert len(finished) >= 1
    assert tree(out) == tree(tmp_path / "whole")


def test_a_beginning_with_other_options_is_refused(hub, out):
    (hub / part("COCO", 2)).write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(FeatureStoreError):
        convert(hub, out)
    assert not out.exists()  # found before anything is written
    store = ResumableStore(out, [Part("a", 1, 1, list)], tokens=1, dim=1, extractor={})
    store.begin()
    with pytest.raises(FeatureStoreError, match="beginning of a store from another source or with other options"):
        ResumableStore(out, [Part("a", 2, 1, list)], tokens=1, dim=1, extractor={})


def test_a_file_that_is_damaged_in_the_middle_is_named(hub, out):
    path = hub / part("COCO", 1)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = os.urandom(4000)
    path.write_bytes(content)
    with pytest.raises(
        FeatureStoreError, match=r"part-00001\.parquet (is damaged|has features|has empty)[\s\S]*fetch it again"
    ):
        convert(hub, out, workers=1)
    assert (out / "features/COCO/shard-00000.json").exists()  # finished, and kept
    assert not list(out.rglob("*.part"))
    with pytest.raises(FeatureStoreError, match="cut short"):
        FeatureStore(out / "features/COCO")


def _cut(hub):
    path = hub / part("nlvr", 0)
    path.write_bytes(path.read_bytes()[:-50])
    return r"part-00000\.parquet is damaged or was cut short"


def _narrow(hub):
    write_shard(hub / part("nlvr", 0), table(ids("nlvr", 0), features()[:, :, :512].copy()))
    return r"part-00000\.parquet has features of type fixed_size_list.*512.* instead of fixed_size_list.*2048"


def _no_column(hub):
    write_shard(hub / part("nlvr", 0), table(ids("nlvr", 0), features()).rename_columns(["image", "features"]))
    return r"has no column 'id', only image, features"


def _other_rows(hub):
    write_shard(hub / part("nlvr", 0), table(ids("nlvr", 0)[:3], features(3)))
    return "has 3 rows, the manifest says 5"


def _other_ids(hub):
    write_shard(hub / part("nlvr", 0), table(ids("COCO", 0), features()))
    return "holds ids that the manifest has not there: COCO_0_000000"


def _twice(hub):
    write_shard(hub / part("nlvr", 0), table([*ids("nlvr", 0)[:4], ids("nlvr", 0)[0]], features()))
    return r"id 'nlvr_0_000000' comes twice, in features/nlvr/.*part-00000\.parquet: fetch the source again"


def _not_finite(hub):
    rows = features()
    rows[2, 1, 1] = np.inf
    write_shard(hub / part("nlvr", 0), table(ids("nlvr", 0), rows))
    return "features that are not finite, of nlvr_0_000002"


def _empty_cell(hub):
    content = table(ids("nlvr", 0), features())
    rows = pa.array([*content["features"].to_pylist()[:4], None], type=content.schema.field("features").type)
    write_shard(hub / part("nlvr", 0), content.set_column(1, "features", rows))
    return "has empty cells|Expected all lists to be of size=49"  # pyarrow 25 notices it first


def _missing_shard(hub):
    (hub / part("COCO", 1)).unlink()
    return r"1 of 3 shards are not in .*COCO/data_clip_RN101_att/part-00001\.parquet; fetch it again"


def _annotation_size(hub):
    (hub / "annotations/vqa/karpathy_train.json").write_bytes(b"[]")
    return r"karpathy_train\.json has 2 bytes, the manifest says 15: fetch it again"


def _annotation_crc(hub):
    (hub / "annotations/vqa/karpathy_train.json").write_bytes(b'[{"sent": "b"}]')
    return r"karpathy_train\.json has CRC-32 .*, the manifest says"


def _manifest(hub):
    (hub / "manifest.json.gz").write_bytes((hub / "manifest.json.gz").read_bytes()[:60])
    return r"manifest\.json\.gz cannot be read"


def _nothing(hub):
    shutil.rmtree(hub / "features")
    return r"no features/DATASET/data_clip_RN101_att/part-\*\.parquet in .*give --source"


DAMAGES = [_cut, _narrow, _no_column, _other_rows, _other_ids, _twice, _not_finite, _empty_cell, _missing_shard]
DAMAGES += [_annotation_size, _annotation_crc, _manifest, _nothing]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_source_that_cannot_be_used_is_one_clear_error(hub, out, damage):
    message = damage(hub)
    with pytest.raises(FeatureStoreError, match=message):
        convert(hub, out, datasets="COCO" if damage is _missing_shard else None)
    assert not list(out.glob("features/nlvr/meta.json"))


def test_ids_that_come_twice_in_two_files_name_both(hub, out):
    same = {part("COCO", n): ids("COCO", 0) for n in range(3)}
    for name, names in same.items():
        write_shard(hub / name, table(names, features()))
    write_manifest(hub, same)
    with pytest.raises(FeatureStoreError, match=r"part-00000\.parquet and in features/COCO/.*part-00001"):
        convert(hub, out, datasets="COCO", workers=1)


def test_an_unknown_data_set_lists_the_known(published, out):
    with pytest.raises(ValueError, match="no features of 'VG': choose from COCO, nlvr"):
        convert(published, out, datasets="COCO,VG")


def test_a_source_without_a_manifest_is_converted_with_a_note(hub, out, capsys):
    (hub / "manifest.json.gz").unlink()
    convert(hub, out)
    assert "has no manifest.json.gz" in capsys.readouterr().out


def test_too_little_space_is_found_before_anything_is_written(published, out, monkeypatch):
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FeatureStoreError, match=r"needs .* GB more, and .* GB are free: make room"):
        convert(published, out)
    assert not (out / "features").exists()


def test_a_disk_that_fills_up_is_named(published, out, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlpet_lightning.atomic_file.os.fsync", full)
    with pytest.raises(FeatureStoreError, match=r"cannot be written \(No space left on device\): free space"):
        convert(published, out)


def test_a_part_with_other_rows_than_promised_is_refused(tmp_path):
    rows = Rows(["a"], np.zeros((1, 2, 3), np.float16))
    store = ResumableStore(tmp_path / "s", [Part("p", 1, 2, lambda: [rows])], tokens=2, dim=3, extractor={})
    with pytest.raises(FeatureStoreError, match="p has 1 rows instead of 2"):
        fill([store], workers=1)
    with pytest.raises(ValueError, match="workers must be 1 or more"):
        fill([store], workers=0)


def test_meta_says_what_was_converted(published, out):
    convert(published, out, datasets="COCO")
    meta = json.loads((out / "features/COCO/meta.json").read_text())
    assert [source["rows"] for source in meta["sources"]] == [ROWS] * 3
    assert meta["extractor"]["model"] == "RN101"
    assert TOKENS == 49
    assert sorted(path.name for path in (out / "features/COCO").iterdir()) == [
        "ids.npy",
        "meta.json",
        "order.npy",
        "shard-00000.npy",
        "shard-00001.npy",
        "shard-00002.npy",
    ]
