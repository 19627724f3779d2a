"""``data extract images`` and ``data extract video``, including unreadable files."""

import multiprocessing
import os
import signal
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from data_modules.extraction import commands as extract
from data_modules.extraction.commands import UNREADABLE, extract_images, extract_video
from data_modules.extraction.media import Images, UnusableFiles, Videos, find_files
from data_modules.extraction.processes import devices_for
from data_modules.extraction.video_frames import frames_of_video
from data_modules.store.resumable import STATE
from data_modules.store.store import META, FeatureStore, FeatureStoreError
from tests.data_modules.extraction.tiny_media import RESNET, picture, sound, video, write_vit
from vlpet_lightning.vision import encoders
from vlpet_lightning.vision.encoders import Encoder, EncoderSettings


@pytest.fixture
def images(tmp_path):
    for number in range(5):
        picture(tmp_path / "images" / "a" / f"{number}.png", number)
    picture(tmp_path / "images" / "b" / "deep" / "x.jpg", 9)
    return tmp_path / "images"


@pytest.fixture
def videos(tmp_path):
    video(tmp_path / "videos" / "long.mkv", range(0, 6000, 500))  # 12 frames: 4 at intervals of 1.5 s
    video(tmp_path / "videos" / "deep" / "short.mp4", [0, 500])
    return tmp_path / "videos"


def images_to(source, out, **changes):
    options = {"model": RESNET, "pretrained": None, "pool": None, "device": "cpu"}
    extract_images(source=source, out=out, **(options | changes))
    return FeatureStore(out) if (out / META).exists() else None


def video_to(source, out, model, **changes):
    extract_video(source=source, out=out, model=model, pretrained=None, device="cpu", **changes)
    return FeatureStore(out)


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def spoil(path):
    path.write_bytes(path.read_bytes()[:-400])


def test_a_store_is_written_in_the_order_of_ids(images, tmp_path):
    store = images_to(images / "a", tmp_path / "store")
    assert (store.ids, store.tokens, store.dim) == (["0", "1", "2", "3", "4"], 16, 512)
    features = store.gather(np.arange(5)).astype(np.float32)
    assert features.std() > 0.1  # batch norm statistics from images, so that features differ in float16
    assert not np.allclose(features[0], features[1])


def test_rows_are_what_the_encoder_gives(images, tmp_path):
    store = images_to(
        images / "a", tmp_path / "store", model=write_vit(tmp_path / "v.json"), batch_size=2, shard_rows=3
    )
    encoder = Encoder(EncoderSettings(str(tmp_path / "v.json")))
    pixels = torch.stack([encoder.pixels(Image.open(images / "a" / f"{n}.png").convert("RGB")) for n in range(5)])
    np.testing.assert_allclose(store.gather(np.arange(5)), encoder(pixels).numpy(), atol=2e-3)


def test_each_folder_becomes_a_store(images, tmp_path):
    images_to(images, tmp_path / "features", each_folder=True)
    assert FeatureStore(tmp_path / "features" / "a").ids == ["0", "1", "2", "3", "4"]
    assert FeatureStore(tmp_path / "features" / "b").ids == ["x"]


def test_the_embedding_of_an_image_is_one_token(images, tmp_path):
    store = images_to(images / "a", tmp_path / "store", features="embedding")
    assert (store.tokens, store.dim) == (1, 64)


@pytest.mark.parametrize("changes", [{"workers": 2}, pytest.param({"processes": 2}, marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_processes(images, tmp_path, changes):
    images_to(images, tmp_path / "one", shard_rows=2)
    images_to(images, tmp_path / "more", shard_rows=2, **changes)
    assert shards(tmp_path / "more") == shards(tmp_path / "one")
    assert len(FeatureStore(tmp_path / "more").meta["shards"]) == 3


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])  # slow on a CPU
def test_the_store_says_what_made_it(images, tmp_path, precision):
    record = images_to(images / "a", tmp_path / "store", seed=7, precision=precision).meta["extractor"]
    assert (record["model"], record["seed"], record["image_size"]) == ("tiny_rn", 7, [128, 128])
    assert (record["resize"], record["precision"], record["features"]) == ("squash", precision, "grid")
    assert all(name in record["versions"] for name in ("open_clip_torch ", "torch ", "pillow "))


def test_a_finished_store_is_left_as_it_is_even_by_newer_libraries(images, tmp_path, capsys, monkeypatch):
    images_to(images / "a", tmp_path / "store")
    before = shards(tmp_path / "store"), (tmp_path / "store" / META).read_bytes()
    monkeypatch.setattr(encoders, "version", lambda package: "99")
    images_to(images / "a", tmp_path / "store")
    assert "up to date" in capsys.readouterr().out
    assert (shards(tmp_path / "store"), (tmp_path / "store" / META).read_bytes()) == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"pool": 2}, {"precision": "bf16"}])
def test_a_store_made_in_another_way_is_not_overwritten(images, tmp_path, change):
    images_to(images / "a", tmp_path / "store")
    with pytest.raises(FeatureStoreError, match="choose another --out"):
        images_to(images / "a", tmp_path / "store", **change)


def _killed_after_two_parts(source, out):
    write, done = extract.ResumableStore.write, []

    def writing(self, *args, **options):
        write(self, *args, **options)
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    extract.ResumableStore.write = writing
    images_to(source, out, shard_rows=1)


def test_a_killed_run_goes_on_to_the_bytes_of_an_undisturbed_one(images, tmp_path):
    images_to(images, tmp_path / "whole", shard_rows=1)
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_after_two_parts, args=(images, tmp_path / "cut")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(FeatureStoreError):
        FeatureStore(tmp_path / "cut")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("shard-*.npy")}
    assert len(kept) == 2
    images_to(images, tmp_path / "cut", shard_rows=1)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in kept} == kept
    assert not (tmp_path / "cut" / STATE).exists()


def test_files_that_cannot_be_read_are_left_out_and_listed_also_later(images, tmp_path, capsys):
    (images / "a" / "bad.png").write_text("not a picture")
    damaged = images / "a" / "1.png"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF  # Pillow decodes it: only its checksum shows the damage
    damaged.write_bytes(bytes(content))
    spoil(images / "b" / "deep" / "x.jpg")
    store = images_to(images, tmp_path / "store", shard_rows=1)  # some shards have no rows
    assert store.ids == ["0", "2", "3", "4"]
    assert np.isfinite(store.gather(np.arange(4))).all()
    listed = (tmp_path / "store" / UNREADABLE).read_text().splitlines()
    files = [damaged, images / "a" / "bad.png", images / "b" / "deep" / "x.jpg"]
    assert [line.split("\t")[0] for line in listed] == list(map(str, files))
    assert "no image" in listed[1]
    assert "truncated" in listed[2]
    assert "3 images cannot be read" in capsys.readouterr().out
    images_to(images, tmp_path / "store", shard_rows=1)
    again = capsys.readouterr().out
    assert "up to date" in again
    assert "3 images cannot be read" in again


def test_a_repaired_file_enters_the_store_and_other_parts_stay(images, tmp_path):
    model, store, path = write_vit(tmp_path / "vit.json"), tmp_path / "store", images / "a" / "3.png"
    images_to(images, tmp_path / "whole", model=model, shard_rows=2)
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert "3" not in images_to(images, store, model=model, shard_rows=2).ids
    first = (store / "shard-00000.npy").stat().st_mtime_ns
    path.write_bytes(whole)
    images_to(images, store, model=model, shard_rows=2)
    assert shards(store) == shards(tmp_path / "whole")
    assert (store / "shard-00000.npy").stat().st_mtime_ns == first
    assert not (store / UNREADABLE).exists()
    assert not (store / STATE).exists()


def test_a_strict_run_ends_with_an_error_and_no_store_until_the_file_is_repaired(images, tmp_path):
    path = images / "a" / "3.png"
    whole = path.read_bytes()
    spoil(path)
    with pytest.raises(UnusableFiles, match=r"1 of 5 images cannot be read \(.*3\.png: .*leave --strict away"):
        images_to(images / "a", tmp_path / "store", strict=True)
    assert not (tmp_path / "store" / META).exists()
    path.write_bytes(whole)
    assert len(images_to(images / "a", tmp_path / "store", strict=True)) == 5


def test_a_run_without_one_readable_file_is_an_error(images, tmp_path):
    for path in (images / "a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UnusableFiles, match="5 of 5 images cannot be read"):
        images_to(images / "a", tmp_path / "store")
    assert not (tmp_path / "store" / META).exists()


def test_features_that_float16_cannot_hold_are_not_stored(images, tmp_path, monkeypatch):
    gives = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, pixels: gives(self, pixels) * 1e9)
    with pytest.raises(UnusableFiles, match="not finite in float16"):
        images_to(images / "a", tmp_path / "store")


def test_a_video_is_one_vector_a_frame_padded_or_pooled(videos, tmp_path):
    model = write_vit(tmp_path / "vit.json")
    store = video_to(videos, tmp_path / "store", model, frames=3)
    assert (store.ids, store.tokens, store.dim) == (["short", "long"], 3, 32)
    assert store.lengths(np.arange(2)).tolist() == [1, 4]
    encoder = Encoder(EncoderSettings(model, features="embedding"))
    frames = frames_of_video(videos / "long.mkv", Fraction("1.5"))
    vectors = encoder(torch.stack([encoder.pixels(frame) for frame in frames]))[:, 0]
    short, long = store.gather(np.arange(2)).astype(np.float32)
    assert not short[1:].any()
    np.testing.assert_allclose(short[0], vectors[0], atol=2e-3)
    np.testing.assert_allclose(long, torch.nn.functional.adaptive_max_pool1d(vectors.T, 3).T, atol=2e-3)
    record = store.meta["extractor"]
    assert (record["seconds_per_frame"], record["frames"], record["features"]) == (1.5, 3, "embedding")
    assert ", av " in record["versions"]


def test_videos_that_cannot_be_read_are_left_out_and_listed(videos, tmp_path):
    sound(videos / "radio.mp4")
    (videos / "empty.webm").write_bytes(b"")
    store = video_to(videos, tmp_path / "store", write_vit(tmp_path / "vit.json"))
    assert store.ids == ["short", "long"]
    assert store.tokens == 64
    assert "radio.mp4\tno video in it" in (tmp_path / "store" / UNREADABLE).read_text()


@pytest.mark.slow
def test_videos_by_two_processes_are_the_same_bytes(videos, tmp_path):
    model = write_vit(tmp_path / "vit.json")
    video_to(videos, tmp_path / "one", model, shard_rows=1)
    video_to(videos, tmp_path / "two", model, shard_rows=1, processes=2)
    assert shards(tmp_path / "two") == shards(tmp_path / "one")


@pytest.mark.slow
def test_a_program_that_is_killed_leaves_no_process_that_writes(images, tmp_path):
    for number in range(5, 400):
        picture(images / "a" / f"{number}.png", number)
    process = multiprocessing.get_context("spawn").Process(
        target=images_to, args=(images, tmp_path / "cut"), kwargs={"shard_rows": 1, "processes": 2}
    )
    process.start()
    while process.is_alive() and not list((tmp_path / "cut").glob("shard-*.json")):
        time.sleep(0.05)
    process.kill()
    process.join()
    time.sleep(2)
    parts = len(list((tmp_path / "cut").glob("shard-*.json")))
    time.sleep(2)
    assert len(list((tmp_path / "cut").glob("shard-*.json"))) == parts < 401


def test_two_files_of_one_id_are_refused(tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "1.jpg")
    with pytest.raises(UnusableFiles, match="have the same id '1'"):
        find_files(tmp_path, Images())


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_files(tmp_path / "nowhere", Images())
    with pytest.raises(FileNotFoundError, match="no videos in"):
        find_files(tmp_path, Videos(1.5, 64))
    with pytest.raises(FileNotFoundError, match="leave --each_folder away"):
        images_to(tmp_path, tmp_path / "out", each_folder=True)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: give --source the folder that holds"):
        images_to(tmp_path / "nowhere", tmp_path / "out", each_folder=True)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("shard_rows", 0), ("workers", -1), ("processes", 0)])
def test_numbers_that_make_no_sense_are_refused_before_anything_is_written(images, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        images_to(images, tmp_path / "store", **{name: value})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("changes", [{"seconds_per_frame": 0}, {"seconds_per_frame": float("inf")}, {"frames": 0}])
def test_a_rate_that_makes_no_sense_is_refused(videos, tmp_path, changes):
    with pytest.raises(ValueError, match="must be positive"):
        extract_video(source=videos, out=tmp_path / "store", **changes)


def test_processes_are_dealt_out_over_gpus(monkeypatch):
    assert devices_for("cpu", None) == ["cpu"]
    assert devices_for("cpu", 2) == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_for("auto", None) == ["cuda:0", "cuda:1"]
    assert devices_for("auto", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_for("cuda:1", None) == ["cuda:1"]
