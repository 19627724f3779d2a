"""The feature store: round trips, and named damage."""

from __future__ import annotations

import json
import multiprocessing
import pickle

import numpy as np
import pytest

from data_modules.store.store import FeatureStore, FeatureStoreError, MissingFeatures
from data_modules.store.writer import FeatureWriter

TOKENS, DIM, ROWS = 4, 8, 11
ROW_BYTES = TOKENS * DIM * 2


def rows(count=ROWS, seed=0):
    return np.random.default_rng(seed).normal(size=(count, TOKENS, DIM)).astype(np.float16)


def names(count=ROWS):
    return [f"COCO_val2014_{number:012d}" for number in range(count, 0, -1)]  # unsorted


@pytest.fixture(params=[100, 3], ids=["one shard", "four shards"])
def store(request, tmp_path):
    with FeatureWriter(
        tmp_path / "s", tokens=TOKENS, dim=DIM, shard_bytes=request.param * ROW_BYTES, extractor={"model": "RN101"}
    ) as writer:
        writer.add(names()[:5], rows()[:5])
        writer.add(names()[5:], rows()[5:])
    return tmp_path / "s"


def test_rows_come_back_in_the_order_asked_for(store):
    opened = FeatureStore(store)
    wanted = [names()[i] for i in (7, 0, 10, 7)]
    assert np.array_equal(opened.gather(opened.rows(wanted)), rows()[[7, 0, 10, 7]])
    assert (len(opened), opened.tokens, opened.dim, opened.ids) == (ROWS, TOKENS, DIM, names())
    assert opened.meta["extractor"] == {"model": "RN101"}


def test_nothing_is_asked_for(store):
    opened = FeatureStore(store)
    assert opened.gather(opened.rows([])).shape == (0, TOKENS, DIM)


def test_missing_images_are_named_with_a_count(store):
    with pytest.raises(
        MissingFeatures, match=r"2 of 3 images have no features in .*: nobody, COCO_val2014_9\."
    ) as error:
        FeatureStore(store).rows(["nobody", names()[0], "COCO_val2014_9"])
    assert error.value.missing == ["nobody", "COCO_val2014_9"]
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_an_id_that_is_longer_than_all_known_is_missing(store):
    with pytest.raises(MissingFeatures):
        FeatureStore(store).rows([names()[0] + "0"])


def test_ids_may_be_any_text(tmp_path):
    ids = ["größe", "日本", "a b", "n1"]
    with FeatureWriter(tmp_path / "s", tokens=TOKENS, dim=DIM) as writer:
        writer.add(ids, rows(4))
    assert FeatureStore(tmp_path / "s").rows(ids[::-1]).tolist() == [3, 2, 1, 0]


def _sum(store):
    return float(store.gather(np.arange(len(store))).astype(np.float64).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_can_be_handed_to_another_process(store, method):
    opened = FeatureStore(store)
    expected = _sum(opened)  # the memory maps are open now
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_sum, (opened,)) == expected


def test_verify_goes_through_every_file(store):
    checked = dict(FeatureStore(store).verify())
    assert {path.name for path in store.glob("*.npy")} == set(checked)


def test_a_changed_shard_is_named_with_its_images(store):
    path = sorted(store.glob("shard-*.npy"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FeatureStoreError, match=rf"{path.name} was changed .* \(it holds \d+ images: COCO_val2014_"):
        list(FeatureStore(store).verify())


def test_a_truncated_shard_is_named_when_it_is_read(store):
    path = sorted(store.glob("shard-*.npy"))[-1]
    path.write_bytes(path.read_bytes()[:-10])
    opened = FeatureStore(store)
    with pytest.raises(FeatureStoreError, match=rf"{path.name} has .* bytes instead of .*cut short"):
        opened.gather(np.arange(ROWS))


def test_a_missing_shard_is_named(store):
    path = sorted(store.glob("shard-*.npy"))[-1]
    path.unlink()
    with pytest.raises(FeatureStoreError, match=rf"{path.name} is missing \(it holds \d+ images"):
        FeatureStore(store).gather(np.arange(ROWS))


def test_a_file_of_the_right_size_but_no_array_is_named(store):
    path = sorted(store.glob("shard-*.npy"))[0]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(FeatureStoreError, match=rf"{path.name} is damaged .it is not a NumPy file"):
        FeatureStore(store).gather(np.arange(1))


def test_an_absent_store_says_what_makes_one(tmp_path):
    with pytest.raises(FeatureStoreError, match="data extract images --source IMAGES --out"):
        FeatureStore(tmp_path / "nothing")


def test_a_store_whose_making_was_cut_short_is_none(tmp_path):
    with pytest.raises(ValueError, match="have shape"), FeatureWriter(tmp_path / "s", tokens=TOKENS, dim=DIM) as writer:
        writer.add(names(), rows()[:, :1])
    with pytest.raises(FeatureStoreError, match="cut short; make it again"):
        FeatureStore(tmp_path / "s")
    with FeatureWriter(tmp_path / "s", tokens=TOKENS, dim=DIM) as writer:  # and can be made again
        writer.add(names(), rows())
    assert len(FeatureStore(tmp_path / "s")) == ROWS


def test_a_complete_store_is_not_written_over(store):
    with pytest.raises(FeatureStoreError, match="complete feature store already"):
        FeatureWriter(store, tokens=TOKENS, dim=DIM)


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}'])
def test_meta_that_cannot_be_read_is_named(store, content):
    (store / "meta.json").write_text(content)
    with pytest.raises(FeatureStoreError, match=r"meta\.json cannot be read"):
        FeatureStore(store)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("rows", "x", "rows is 'x'"),
        ("rows", 3, "rows is 3, its shards have"),
        ("dim", -1, "dim is -1"),
        ("extractor", None, "extractor is None"),
        ("shards", {}, "shards is {}"),
        ("shards", [7], r"shards\[0\] is 7"),
        ("index", [{"file": 1}], r"index\[0\].file is 1"),
        ("encoding", [1], r"unknown row encoding"),
    ],
)
def test_a_wrong_value_in_meta_is_named_with_the_file(store, part, value, message):
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps(meta | {part: value}))
    with pytest.raises(FeatureStoreError, match=message) as error:
        FeatureStore(store)
    assert str(store) in str(error.value)


def test_a_later_format_is_refused(store):
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    with pytest.raises(FeatureStoreError, match="has format 99"):
        FeatureStore(store)


@pytest.mark.parametrize(
    ("ids", "features", "message"),
    [
        (["a", "b"], rows(3), "features of 2 images have shape"),
        (["a", "a"], rows(2), "image ids come twice: a"),
        (["known"], rows(1), "image ids come twice: known"),
        (["a"], np.full((1, TOKENS, DIM), 1e6), "features of 1 images are not finite in float16: a"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, ids, features, message):
    writer = FeatureWriter(tmp_path / "s", tokens=TOKENS, dim=DIM)
    writer.add(["known"], rows(1))
    with pytest.raises(ValueError, match=message):
        writer.add(ids, features)


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image was added"), FeatureWriter(tmp_path / "s", tokens=1, dim=1):
        pass
