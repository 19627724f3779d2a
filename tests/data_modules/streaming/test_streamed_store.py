"""Streamed stores compared with local ones, and runs on them, with failing servers."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from data_modules.batches.dataset import TaskDataset
from data_modules.convert.hub import convert_hub
from data_modules.image_text import ImageTextDataModule
from data_modules.store.recode import recode
from data_modules.store.store import FeatureStore, FeatureStoreError, MissingFeatures
from data_modules.store.writer import FeatureWriter
from data_modules.streaming.order import windows
from data_modules.streaming.streamed_store import Stream, open_stream
from tests.data_modules.convert import tiny_hub
from tests.data_modules.streaming.faulty_server import serve
from tests.data_modules.test_resume import Kill, Recorder, checkpoints, trainer
from tests.data_modules.tiny_data import write_tokenizer, write_world
from vlpet_lightning.__main__ import run

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
TOKENS, DIM, IMAGES = 4, 8, 30
SHARD_ROWS = 4
QUICK = {"attempts": 3, "first_wait": 0.01, "timeout": 2.0, "threads": 0}


def quick(tmp_path, **changes):
    return Stream(**({"cache": str(tmp_path / "cache"), "max_gb": 1.0} | QUICK | changes))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Write a data root with a store of 8 shards, and the same store with other encodings."""
    root = tmp_path_factory.mktemp("ours")
    features = np.random.default_rng(0).standard_normal((IMAGES, TOKENS, DIM)).astype(np.float16)
    size = SHARD_ROWS * TOKENS * DIM * 2
    with FeatureWriter(root / "features" / "COCO", tokens=TOKENS, dim=DIM, shard_bytes=size) as writer:
        writer.add([f"image{number}" for number in range(IMAGES)], features)
    for rows in ("uint8", "zstd"):
        recode(source=root / "features" / "COCO", out=root / "features" / rows, rows=rows)
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The published layout, with one file in another row order than the manifest, and its conversion."""
    root = tiny_hub.make_hub(tmp_path_factory.mktemp("hub"))
    path = root / tiny_hub.part("COCO", 0)
    tiny_hub.write_shard(path, pq.read_table(path).take([3, 0, 4, 1, 2]))
    out = tmp_path_factory.mktemp("converted")
    convert_hub(source=str(root), out=out)
    convert_hub(source=str(root), out=out / "grid", pool=None)
    return root, out


@pytest.fixture(scope="module")
def s3():
    """A local S3 server with a bucket, and its storage options."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = {"endpoint_url": f"http://{host}:{port}"}
    options = {"key": "key", "secret": "secret", "client_kwargs": client}
    filesystem = s3fs.S3FileSystem(**options)
    filesystem.mkdir("bucket")
    yield filesystem, options
    server.stop()


def same(store, local, seed=0):
    """Compare a streamed store with a local one: ids in random order and repeated."""
    assert sorted(store.ids) == sorted(local.ids)
    assert (len(store), store.tokens, store.dim) == (len(local), local.tokens, local.dim)
    ids = np.random.default_rng(seed).permutation(local.ids * 2).tolist()
    for chosen in (ids, ids[:3]):
        got, wanted = store.gather(store.rows(chosen)), local.gather(local.rows(chosen))
        assert got.dtype == wanted.dtype == np.float16
        assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", ["COCO", "uint8", "zstd"])
def test_a_store_of_ours_is_streamed_bit_for_bit_from_a_folder_a_file_url_and_a_web_server(ours, tmp_path, name):
    local = FeatureStore(ours / "features" / name)
    with serve(ours, listing=False) as site:
        for number, url in enumerate([str(ours), f"file://{ours}/features", site.url, f"{site.url}/features/"]):
            same(open_stream(url, name, quick(tmp_path / str(number))), local)


@pytest.mark.parametrize("listing", [True, False])
def test_published_parquet_is_streamed_bit_for_bit_as_converting_it_would_make_it(hub, tmp_path, listing):
    root, out = hub
    with serve(root, listing=listing) as site:
        for number, url in enumerate([str(root), f"file://{root}", site.url, f"{site.url}/features"]):
            store = open_stream(url, "COCO", quick(tmp_path / str(number)))
            assert store.rows(tiny_hub.ids("COCO", 0)).tolist() == [0, 1, 2, 3, 4]  # as listed in the manifest
            same(store, FeatureStore(out / "features" / "COCO"))
            assert not list((tmp_path / str(number)).rglob("*.scratch"))


def test_published_parquet_is_streamed_without_pooling(hub, tmp_path):
    root, out = hub
    same(open_stream(str(root), "nlvr", quick(tmp_path, pool=None)), FeatureStore(out / "grid" / "features" / "nlvr"))


def test_without_a_manifest_the_ids_are_read_from_the_parquet_files(hub, tmp_path):
    root, out = hub
    shutil.copytree(root / "features", tmp_path / "bare" / "features")
    with serve(tmp_path / "bare") as site:
        for number, url in enumerate([str(tmp_path / "bare"), site.url]):
            store = open_stream(url, "COCO", quick(tmp_path / str(number)))
            assert store.ids == FeatureStore(out / "features" / "COCO").ids
            same(store, FeatureStore(out / "features" / "COCO"))


def test_an_index_is_there_before_any_shard_is_fetched(hub, ours, tmp_path):
    for root, name in ((hub[0], "COCO"), (ours, "COCO")):
        with serve(root) as site:
            store = open_stream(site.url, name, quick(tmp_path))
            store.rows(store.ids)
            assert site.fetched() == {}
            store.gather(np.array([0]))
            assert list(site.fetched().values()) == [1]


def test_stores_and_parquet_are_streamed_from_s3(ours, hub, s3, tmp_path):
    filesystem, options = s3
    filesystem.put(str(ours / "features"), "bucket/ours/features", recursive=True)
    filesystem.put(str(hub[0]), "bucket/hub", recursive=True)
    stream = quick(tmp_path, options=options)
    same(open_stream("s3://bucket/ours", "COCO", stream), FeatureStore(ours / "features" / "COCO"))
    same(open_stream("s3://bucket/hub", "COCO", stream), FeatureStore(hub[1] / "features" / "COCO"))
    with pytest.raises(FeatureStoreError, match="no features of VG at s3://bucket/hub"):
        open_stream("s3://bucket/hub", "VG", stream)
    store = open_stream("s3://bucket/ours", "COCO", quick(tmp_path / "other", options=options))
    filesystem.pipe("bucket/ours/features/COCO/shard-00000.npy", b"wrong")
    with pytest.raises(FeatureStoreError, match=r"shard-00000.npy could not be read in 3 attempts.*5 bytes arrived"):
        store.gather(np.array([0]))
    filesystem.rm("bucket/ours/features/COCO/shard-00001.npy")
    with pytest.raises(FeatureStoreError, match=r"shard-00001.npy cannot be read"):
        store.gather(np.array([SHARD_ROWS]))


@pytest.mark.parametrize("fault", ["hang", "reset", "cut", "short", "wrong", "500"])
def test_failures_of_a_server_change_nothing_of_what_is_gathered(ours, hub, tmp_path, caplog, fault):
    for root, name, local in ((ours, "COCO", ours), (hub[0], "nlvr", hub[1])):
        with serve(root) as site:
            site.fail(r"\.npy|\.parquet", fault, fault)
            stream = quick(tmp_path / name, timeout=0.5)
            same(open_stream(site.url, name, stream), FeatureStore(local / "features" / name))
            assert site.faults == []
    assert len([record for record in caplog.records if "attempt" in record.message]) == 4


def test_a_parquet_file_that_stays_damaged_is_one_error(hub, tmp_path):
    root = shutil.copytree(hub[0], tmp_path / "hub")
    path = root / tiny_hub.part("nlvr", 0)
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    store = open_stream(str(root), "nlvr", quick(tmp_path))
    with pytest.raises(FeatureStoreError, match=r"part-00000.parquet could not be read in 3 attempts.*it is damaged"):
        store.gather(np.array([0]))
    assert not [path for path in store.path.glob("shard-*") if path.suffix != ".lock"]


@pytest.mark.parametrize("take", [[0, 1, 2, 3], [0, 1, 2, 3, 3]])
def test_a_parquet_file_without_ids_of_the_manifest_is_refused(hub, tmp_path, take):
    root = shutil.copytree(hub[0], tmp_path / "hub")
    path = root / tiny_hub.part("nlvr", 0)
    tiny_hub.write_shard(path, pq.read_table(path).take(take))
    store = open_stream(str(root), "nlvr", quick(tmp_path))
    with pytest.raises(FeatureStoreError, match=r"has 4 rows, the manifest says 5|it lacks 1 ids of the manifest"):
        store.gather(np.array([0]))


def test_shards_that_the_manifest_lists_and_the_source_lacks_are_named_at_once(hub, tmp_path):
    root = shutil.copytree(hub[0], tmp_path / "hub")
    (root / tiny_hub.part("COCO", 1)).unlink()
    with pytest.raises(FeatureStoreError, match=r"1 of 3 shards are not in .*part-00001.parquet"):
        open_stream(str(root), "COCO", quick(tmp_path))


def test_where_there_are_no_features_the_places_looked_at_are_named(ours, tmp_path):
    with serve(ours) as site, pytest.raises(FeatureStoreError, match=r"neither VG/meta.json of a feature store nor"):
        open_stream(site.url, "VG", quick(tmp_path))


def test_a_store_that_was_made_again_at_the_same_url_never_meets_its_old_shards(ours, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(ours / "features" / "COCO", root / "features" / "COCO")
    before = open_stream(str(root), "COCO", quick(tmp_path))
    first = before.gather(np.arange(IMAGES))
    shutil.rmtree(root)
    with FeatureWriter(root / "features" / "COCO", tokens=TOKENS, dim=DIM) as writer:
        writer.add(before.ids, first + 1)
    after = open_stream(str(root), "COCO", quick(tmp_path))
    assert np.array_equal(after.gather(np.arange(IMAGES)), first + 1)
    assert np.array_equal(before.gather(np.arange(IMAGES)), first)  # from the cache


def test_what_is_damaged_in_the_cache_is_to_be_removed_and_then_comes_again(ours, tmp_path):
    whole = open_stream(str(ours), "COCO", quick(tmp_path)).gather(np.arange(IMAGES))
    for name, content in (("shard-00001.npy", b"x"), ("ids.npy", b"")):
        (path,) = (tmp_path / "cache").rglob(name)
        path.write_bytes(content.ljust(path.stat().st_size if content else 0, b"x"))
        store = open_stream(str(ours), "COCO", quick(tmp_path))
        with pytest.raises(FeatureStoreError, match=rf"{name}.*remove {path.parent}, and it is fetched again"):
            store.gather(store.rows([f"image{number}" for number in range(IMAGES)]))
        shutil.rmtree(path.parent)
        assert np.array_equal(open_stream(str(ours), "COCO", quick(tmp_path)).gather(np.arange(IMAGES)), whole)


def test_a_store_whose_files_would_lie_outside_of_the_cache_is_refused(ours, tmp_path):
    root = shutil.copytree(ours / "features" / "COCO", tmp_path / "root" / "features" / "COCO")
    meta = (root / "meta.json").read_text()
    (root / "meta.json").write_text(meta.replace("shard-00001.npy", "../../shard-00001.npy"))
    with pytest.raises(
        FeatureStoreError, match=r"has files of other names than a store's: \['../../shard-00001.npy'\]"
    ):
        open_stream(str(tmp_path / "root"), "COCO", quick(tmp_path))


def test_ids_without_features_are_named_with_the_address(ours, tmp_path):
    store = open_stream(str(ours), "COCO", quick(tmp_path))
    with pytest.raises(MissingFeatures, match=f"1 of 2 images have no features in {ours}/features/COCO: nothing"):
        store.rows(["image1", "nothing"])


def test_the_cache_stays_within_its_bound_while_everything_is_read(ours, tmp_path):
    local = FeatureStore(ours / "features" / "COCO")
    size = local.meta["shards"][0]["bytes"]
    store = open_stream(str(ours), "COCO", quick(tmp_path, max_gb=2.5 * size / 1e9))
    rows = np.random.default_rng(0).permutation(IMAGES)
    for start in range(0, IMAGES, 3):  # three shards at a time, but only two fit
        chosen = rows[start : start + 3]
        assert store.gather(chosen).tobytes() == local.gather(chosen).tobytes()
        there = [path.stat().st_size for path in store.path.glob("shard-*.npy")]
        assert 0 < sum(there) <= 2.5 * size


def test_a_cache_that_is_too_small_is_refused_before_anything_is_fetched(ours, hub, tmp_path):
    size = FeatureStore(ours / "features" / "COCO").meta["shards"][0]["bytes"]
    with serve(ours) as site, pytest.raises(FeatureStoreError, match=r"a shard of .* raise .*max_gb"):
        open_stream(site.url, "COCO", quick(tmp_path, max_gb=(size - 1) / 1e9))
    one = open_stream(str(ours), "COCO", quick(tmp_path, max_gb=1.5 * size / 1e9))
    other = open_stream(str(ours), "uint8", quick(tmp_path, max_gb=1.5 * size / 1e9))
    stores = {"vqa": one, "caption": one, "gqa": other}
    with pytest.raises(FeatureStoreError, match=r"1 of .*COCO, 1 of .*uint8\): raise data.init_args.stream.max_gb"):
        windows(stores, {"vqa": 1, "caption": 1, "gqa": 1}, together=True)
    with pytest.raises(FeatureStoreError, match=r"2 of .*COCO"):
        windows({"nlvr2": one}, {"nlvr2": 2}, together=True)
    assert {**windows(stores, {"vqa": 1, "caption": 1, "gqa": 1}, together=False)}["vqa"] == (1, 0)
    wide = open_stream(str(ours), "COCO", quick(tmp_path, max_gb=10.5 * size / 1e9))
    assert windows({"vqa": wide, "caption": wide}, {"vqa": 1, "caption": 1}, together=True)["vqa"] == (7, 2)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("max_gb", 0, "more than 0"),
        ("attempts", 0, "1 or more"),
        ("timeout", -1, "more than 0"),
        ("threads", -1, "0 or"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(field, value, wanted):
    with pytest.raises(ValueError, match=f"stream.{field} must be {wanted}.*, got {value}"):
        Stream(**{field: value})


def test_the_cache_lies_on_the_node_s_disk_or_below_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Stream().folder == tmp_path / "vlpet_lightning" / "shards"
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "node"))
    assert Stream().folder == tmp_path / "node" / "vlpet_lightning" / "shards"


def test_expected_shards_are_fetched_in_the_background_and_a_failure_waits_until_one_is_needed(ours, tmp_path, caplog):
    with serve(ours) as site:
        store = open_stream(site.url, "COCO", quick(tmp_path, threads=2))
        site.fail("shard-00002", "404")
        store.expect([0, 1, 2])
        until(lambda: len(site.fetched()) == 3 and len(list(store.path.glob("shard-*.npy"))) == 2)
        store.gather(np.arange(2 * SHARD_ROWS))
        assert set(site.fetched().values()) == {1}
        store.gather(np.arange(3 * SHARD_ROWS))  # the failure is over, so it is fetched now
        site.fail("shard-00003", "404", "404")
        store.expect([3])
        until(lambda: len(site.fetched()) == 4)
        with pytest.raises(FeatureStoreError, match=r"shard-00003.npy cannot be read"):
            store.gather(np.array([3 * SHARD_ROWS]))


def until(condition):
    """Wait for another thread."""
    import time

    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in 10 s")


def gather_all(url, folder, log, barrier):
    """Run in each of two processes; records the shards fetched."""
    store = open_stream(url, "COCO", Stream(cache=str(folder), max_gb=1.0, **QUICK))
    barrier.wait()
    log.put(store.gather(np.arange(IMAGES)).tobytes())


def test_two_processes_with_one_cache_fetch_each_file_once(ours, tmp_path):
    context = multiprocessing.get_context("fork")
    log, barrier = context.Queue(), context.Barrier(2)
    with serve(ours) as site:
        arguments = (site.url, tmp_path / "cache", log, barrier)
        processes = [context.Process(target=gather_all, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        contents = {log.get(timeout=60) for _ in processes}
        for process in processes:
            process.join()
        assert contents == {FeatureStore(ours / "features" / "COCO").gather(np.arange(IMAGES)).tobytes()}
        assert set(site.fetched(r"shard-|ids|order").values()) == {1}
        assert len(site.fetched()) == 8


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_store_works_in_worker_processes_that_were_forked_or_spawned(ours, tmp_path, start):
    with serve(ours) as site:
        store = open_stream(site.url, "COCO", quick(tmp_path, threads=1))
        store.expect([0])
        store.gather(np.array([0]))  # threads and connections exist before the fork
        loader = DataLoader(
            Rows(store),
            batch_size=None,
            num_workers=1 if start == "spawn" else 2,  # a spawned process imports everything
            multiprocessing_context=start,
            persistent_workers=False,
        )
        got = torch.stack(list(loader)).numpy()
    assert got.tobytes() == FeatureStore(ours / "features" / "COCO").gather(np.arange(IMAGES)).tobytes()
    assert len(pickle.dumps(store)) < 10_000


class Rows(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return IMAGES

    def __getitem__(self, row):
        self.store.expect([7, 6])
        return torch.from_numpy(self.store.gather(np.array([row])))[0]


# Runs: the tiny world in the published layout, with two shards of each data set.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The world in the published layout, and its data root after conversion."""
    plain = tmp_path_factory.mktemp("plain")
    write_world(plain)
    root = tmp_path_factory.mktemp("published")
    shards = {}
    for folder in (plain / "features").iterdir():
        ids = FeatureStore(folder).ids
        for number, names in enumerate((ids[::2], ids[1::2])):
            shard = tiny_hub.part(folder.name, number)
            shards[shard] = names
            rows = tiny_hub.features(len(names), seed=len(shards))
            tiny_hub.write_shard(root / shard, tiny_hub.table(names[::-1], rows))
    annotations = {}
    for name in ("vqa", "GQA", "nlvr", "COCO"):
        shutil.copytree(plain / name, root / "annotations" / name)
        annotations |= {f"{name}/{path.name}": path.read_bytes() for path in (plain / name).iterdir()}
    tiny_hub.write_manifest(root, shards, annotations)
    out = tmp_path_factory.mktemp("converted")
    convert_hub(source=str(root), out=out)
    write_tokenizer(out / "tokenizer")
    return root, out


def data(world, root, cache, **options):
    defaults = {"batch_size": 3, "tasks": ["vqa", "nlvr2"], "answer_draw": "seeded", "token_cache": False}
    stream = None if cache is None else Stream(**({"cache": str(cache), "max_gb": 1.0} | QUICK))
    return ImageTextDataModule(
        root=str(root), tokenizer=str(world[1] / "tokenizer"), **({"stream": stream} | defaults | options)
    )


def fit(world, root, folder, *, ckpt_path=None, callbacks=(), cache=None, **options):
    model = Recorder()
    module = data(world, root, cache or folder / "cache", **options)
    trainer(folder, callbacks).fit(model, module, ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run from the published layout over HTTP, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    with serve(world[0]) as site:
        return fit(world, site.url, folder, callbacks=[checkpoints(folder)]), folder


def test_epochs_of_a_streamed_run_differ_and_each_has_every_sample_once(whole):
    seen = whole[0].seen
    epochs = [[(task, id) for e, _, task, ids, _ in seen if e == epoch for id in ids] for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(len(epoch) == len(set(epoch)) == 14 for epoch in epochs)


@pytest.mark.parametrize("step", [1, 4, 9, 10, 13, 29])
def test_a_streamed_run_resumed_at_any_step_sees_exactly_the_remaining_batches(world, whole, tmp_path, step):
    with serve(world[0]) as site:  # at another URL, with an empty cache
        resumed = fit(world, site.url, tmp_path, ckpt_path=whole[1] / f"step={step}.ckpt")
    assert resumed.seen == whole[0].seen[step:]


@pytest.mark.parametrize("max_gb", [0.02, None])
def test_a_run_is_not_resumed_where_samples_come_in_another_order(world, whole, tmp_path, max_gb):
    stream = None if max_gb is None else Stream(cache=str(tmp_path), max_gb=max_gb, **QUICK)
    root = world[1] if max_gb is None else world[0]
    with pytest.raises(ValueError, match=r"cannot resume: samples were mixed over .*'nlvr2': \[\d+, 2\].* now"):
        fit(world, root, tmp_path, ckpt_path=whole[1] / "step=4.ckpt", stream=stream)


def test_a_resumed_streamed_run_with_a_worker_process_sees_the_remaining_batches(world, whole, tmp_path):
    resumed = fit(world, world[0], tmp_path, ckpt_path=whole[1] / "step=17.ckpt", num_workers=1)
    assert resumed.seen == whole[0].seen[17:]


def test_batches_have_the_features_that_converted_stores_would_give(world, tmp_path):
    with serve(world[0]) as site:
        streamed, local = data(world, site.url, tmp_path / "cache"), data(world, world[1], None)
        for module in (streamed, local):
            trainer(tmp_path).validate(Recorder(), module, verbose=False)
        for task in ("vqa", "nlvr2"):
            one, other = (everything(module.datasets["val"], task) for module in (streamed, local))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[id], other[id]) for id in one)


def everything(dataset: TaskDataset, task: str) -> dict[str, torch.Tensor]:
    from data_modules.batches.sampling import Plan

    batch = dataset[Plan(task, np.arange(len(dataset.tasks[task])))]
    return dict(zip(batch.ids, batch.features, strict=True))


def test_predictions_of_a_streamed_split_have_every_sample_once(world, tmp_path):
    batches = trainer(tmp_path).predict(Recorder(), data(world, world[0], tmp_path / "cache"))
    ids = [id for batch in batches for id in batch]
    assert sorted(ids) == sorted([*map(str, range(11, 15)), *(f"nlvr2_test_{i}" for i in range(4))])


def test_annotations_at_a_url_are_fetched_once_checked_and_fetched_again_when_they_change(world, tmp_path):
    root = shutil.copytree(world[0], tmp_path / "root")
    with serve(root) as site:
        for _ in range(2):
            fit(world, site.url, tmp_path, limit_train=3)
        assert set(site.fetched("^/annotations/(vqa/karp|nlvr)").values()) == {1}
        path = root / "annotations" / "vqa" / "karpathy_train.json"
        records = json.loads(path.read_text())
        path.write_text(json.dumps(records[:5]))
        with pytest.raises(FeatureStoreError, match=r"karpathy_train.json could not be read.*its CRC-32 is|instead of"):
            fit(world, site.url, tmp_path)  # the manifest differs


def test_an_annotation_file_that_is_not_there_is_named_before_a_run(world, tmp_path):
    root = shutil.copytree(world[0], tmp_path / "root")
    (root / "annotations" / "nlvr" / "train.json").unlink()
    with (
        serve(root) as site,
        pytest.raises(FileNotFoundError, match=f"no annotation file nlvr/train.json at {site.url}"),
    ):
        fit(world, site.url, tmp_path)


def test_the_shipped_overlay_trains_a_tiny_model_from_parquet_on_a_web_server(world, tmp_path, tiny_backbone):
    config = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "callbacks": []},
        "model": {"init_args": {"backbone": str(tiny_backbone)}},
        "data": {"init_args": {"batch_size": 3, "token_cache": False}},
    }
    config["trainer"] |= {"enable_progress_bar": False, "default_root_dir": str(tmp_path)}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    words = [EXPERIMENTS / "image_text.yaml", EXPERIMENTS / "stream.yaml", tmp_path / "tiny.yaml"]
    with serve(world[0]) as site:
        site.fail(r"\.parquet|\.json", "500", "cut")
        cache = ["--data.init_args.stream.cache", str(tmp_path / "cache"), "--data.init_args.stream.first_wait=0.01"]
        configs = [word for path in words for word in ("--config", str(path))]
        assert run(["fit", *configs, "--data.init_args.root", site.url, *cache]) == 0
        assert set(site.fetched("parquet")) == {"part-00000.parquet", "part-00001.parquet"}
        assert site.faults == []
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 19


def test_features_alone_may_be_at_a_url(world, tmp_path):
    shutil.copytree(world[0] / "annotations", tmp_path / "root")
    with serve(world[0]) as site:
        assert len(fit(world, tmp_path / "root", tmp_path, features=site.url).seen) == 30
        assert len(fit(world, tmp_path / "root", tmp_path, features=f"{site.url}/features").seen) == 30


class Stop(Kill):
    """Makes a server fail and empties the cache."""

    def __init__(self, site, step):
        super().__init__(step)
        self.site = site

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.site.fail(".", "500", times=99)
            for path in trainer.datamodule.places.stream.folder.glob("*/shard-*.npy"):
                path.unlink()


def test_a_run_whose_server_dies_ends_with_one_error_that_names_the_shard(world, tmp_path):
    message = r"part-0000\d.parquet could not be read in 3 attempts"
    with serve(world[0]) as site, pytest.raises(FeatureStoreError, match=message) as caught:
        fit(world, site.url, tmp_path, callbacks=[Stop(site, step=4)])
    assert "500" in str(caught.value)
    assert "start the run again: it resumes from its last checkpoint" in str(caught.value)
