"""Batches of pixels, read from image files by a model's own image processor."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress

from data_modules import ImageTextDataModule, VideoTextDataModule
from data_modules.batches.sampling import Plan
from data_modules.check.check import DataCheck
from data_modules.extraction.commands import extract_images
from data_modules.extraction.image_files import ImageFiles, MissingImages, UnreadableImage
from data_modules.extraction.media import UnusableFiles
from data_modules.store.store import FeatureStore
from data_modules.streaming.streamed_store import Stream
from tests.backbones.test_tower_runs import draw_images
from tests.backbones.tiny_vlm import SAVED, SQUARE, save
from tests.data_modules.tiny_data import write_world
from vlpet_lightning import VLCausal
from vlpet_lightning.backbones.unloaded_tower import is_whole
from vlpet_lightning.user_errors import for_the_user


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with image files and a tiny SmolVLM."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    draw_images(folder / "features", folder / "images")
    save("smolvlm", folder / "backbone")
    return folder


def data_of(world, images=None, **options):
    given = {"root": str(world), "tokenizer": str(world / "backbone"), "batch_size": 3, "num_workers": 0}
    return ImageTextDataModule(**(given | {"images": str(images or world / "images")} | options))


def module_of(world, **options):
    given = {"trainable": ["visual_embedding"], "image_input": "pixels", **SAVED["smolvlm"].settings}
    return VLCausal(str(world / "backbone"), **(given | options))


def ready(world, **options):
    """Return a data module for the test split that can read images."""
    data = data_of(world, **options)
    data.setup("test")
    data.read_images_with(module_of(world).pixel_reader())
    return data


def test_a_batch_has_the_pixels_of_its_images_in_order(world):
    data = ready(world)
    for task, rows in (("vqa", [2, 0, 2]), ("nlvr2", [1, 0])):
        batch = data.datasets["test"].tasks[task].batch(Plan(task, np.array(rows)))
        pixels = batch.features if task == "nlvr2" else batch.features[:, None]
        assert pixels.shape == (len(rows), 1 + (task == "nlvr2"), 3 * SQUARE, SQUARE)
        reader = module_of(world).pixel_reader()
        folder = world / "images" / data.tasks[task].splits["test"].features
        for sample, ids in enumerate(batch.images):
            for place, name in enumerate(ids):
                with Image.open(folder / f"{name}.png") as image:
                    assert torch.equal(pixels[sample, place], reader(image.convert("RGB")))
    assert pixels.dtype == torch.float32


def test_a_file_is_read_once_for_a_batch(world, monkeypatch):
    files = ImageFiles(world / "images" / "COCO")
    files.reader, read = module_of(world).pixel_reader(), []
    monkeypatch.setattr(files, "read", lambda path: read.append(path) or ImageFiles.read(files, path))
    found = files.gather(np.array([4, 1, 4, 1]))
    assert sorted(read) == sorted([files.paths[1], files.paths[4]])
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def test_worker_processes_make_the_same_batches(world):
    batches = [list(ready(world, num_workers=workers).test_dataloader()) for workers in (0, 2)]
    assert len(batches[0]) == len(batches[1]) > 1
    for one, other in zip(*batches, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.features, other.features)


def test_the_default_number_of_workers_is_that_of_the_cores(world, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert data_of(world, num_workers=None).workers() == 6
    assert data_of(world).workers() == 0
    assert ImageTextDataModule(str(world), str(world / "backbone")).workers() == 0
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert data_of(world, num_workers=None).workers() == 0


def test_the_reader_can_be_sent_to_a_process(world):
    reader = module_of(world).pixel_reader()
    image = Image.effect_noise((30, 20), 90).convert("RGB")
    assert torch.equal(pickle.loads(pickle.dumps(reader))(image), reader(image))


def test_a_blind_control_gets_the_pixels_of_other_images(world):
    seen, blind = ready(world), ready(world, shuffle_features=True)
    rows = [data.datasets["test"].tasks["vqa"].images for data in (seen, blind)]
    assert (rows[0] != rows[1]).all()


@pytest.mark.parametrize(("name", "value"), [("features", "elsewhere"), ("bank", "ram"), ("stream", Stream())])
def test_settings_of_stored_features_beside_images_are_refused(world, name, value):
    with pytest.raises(ValueError, match=rf"images is .* and {name} is .*: {name} is about stored .*remove one"):
        data_of(world, **{name: value})


def test_videos_have_no_images(world):
    with pytest.raises(TypeError, match="images"):
        VideoTextDataModule(str(world), str(world / "backbone"), images=str(world / "images"))


def test_images_without_a_file_are_named_before_training(world, tmp_path):
    images = shutil.copytree(world / "images", tmp_path / "images")
    gone = sorted((images / "COCO").iterdir())[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(MissingImages, match=rf"2 of \d+ images have no file in .*COCO: {gone[0].stem}, .*Add the"):
        data_of(world, images).setup("fit")


def test_two_files_of_one_image_are_refused(world, tmp_path):
    images = shutil.copytree(world / "images", tmp_path / "images")
    path = next((images / "COCO").iterdir())
    shutil.copy(path, path.with_suffix(".jpg"))
    with pytest.raises(UnusableFiles, match=f"have the same id '{path.stem}'"):
        data_of(world, images).setup("fit")


def test_a_missing_folder_is_named(world, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*: give --source|no folder"):
        data_of(world, tmp_path / "nothing").prepare_data()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(world, tmp_path, workers):
    images = shutil.copytree(world / "images", tmp_path / "images")
    data = ready(world, images=images, tasks=["vqa"], num_workers=workers)
    (name,) = data.datasets["test"].tasks["vqa"].samples.images[0]
    (images / "COCO" / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=rf"{name}.png cannot be read \(no image, .*\): copy it again") as error:
        list(data.test_dataloader())
    told = for_the_user(error.value)
    assert isinstance(told, UnreadableImage)
    assert str(told).startswith(f"the image {images / 'COCO' / name}.png cannot be read (")
    assert "\n" not in str(told)
    progress = Progress(disable=True)
    check = DataCheck(data_of(world, images, tasks=["vqa"]), ["test"], True, progress)
    check.run()
    assert [finding for finding in check.findings if name in str(finding)]


LEFT = """
import time
from multiprocessing import get_context
from vlpet_lightning.run.signals import end_workers_at_exit, leave_it_to_the_run

worker = get_context("fork").Process(target=lambda: (leave_it_to_the_run(0), time.sleep(600)), daemon=True)
worker.start()
time.sleep(0.5)
end_workers_at_exit()
"""


def test_a_process_does_not_wait_at_its_end_for_workers_that_ignore_signals():
    assert subprocess.run([sys.executable, "-c", LEFT], timeout=60).returncode == 0


def test_images_are_not_read_without_a_model(world):
    data = data_of(world)
    data.setup("test")
    with pytest.raises(RuntimeError, match=r"before the model is built: call data.read_images_with"):
        next(iter(data.test_dataloader()))


def test_the_record_tells_files_and_processing_apart(world, tmp_path):
    def described(data):
        return data.provenance("test")["splits"]["test"]["vqa"]["store"]

    first = described(ready(world))
    assert first["encoding"] == "pixels"
    assert first["extractor"]["features"] == "pixels"
    assert first["extractor"]["exif_orientation"] is True
    assert first["extractor"]["processing"]["image_mean"] == [0.5, 0.5, 0.5]
    assert (first["tokens"], first["dim"]) == (3 * SQUARE, SQUARE)
    images = shutil.copytree(world / "images", tmp_path / "images")
    assert described(ready(world, images=images)) == first
    path = next((images / "COCO").iterdir())
    Image.new("RGB", (90, 90)).save(path)
    assert described(ready(world, images=images))["checksum"] != first["checksum"]
    assert described(ready(world, exif_orientation=False))["extractor"] != first["extractor"]


def test_pixels_give_the_features_that_extraction_stores(world, tmp_path):
    images = world / "images" / "COCO"
    extract_images(source=images, out=tmp_path / "out", model=f"hf:{world / 'backbone'}", workers=0, device="cpu")
    store, files, module = FeatureStore(tmp_path / "out"), ImageFiles(images), module_of(world)
    files.reader = module.pixel_reader()
    module.configure_model()
    assert is_whole(module.model.lm)
    ids = store.ids[:3]
    pixels = torch.from_numpy(files.gather(files.rows(ids))).unflatten(1, (3, -1))
    with torch.no_grad():
        found = module.model.backbone.tower_output(module.model.lm, pixels)
    torch.testing.assert_close(found.half(), torch.from_numpy(store.gather(store.rows(ids))), rtol=2e-3, atol=2e-3)
