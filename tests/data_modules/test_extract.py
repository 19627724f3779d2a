"""Images into feature stores through open_clip, with small random encoders."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from data_modules.extract import Extractor, UnusableImages, extract, find_images
from data_modules.features import META, FeatureStore, FeatureStoreError

TINY = str(Path(__file__).parents[2] / "experiments" / "clip" / "tiny_rn.json")
VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
}


def picture(path, seed=0, size=(50, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path):
    for number in range(5):
        picture(tmp_path / "images" / "a" / f"{number}.png", number)
    picture(tmp_path / "images" / "b" / "deep" / "x.jpg", 9)
    return tmp_path / "images"


def tiny(**changes):
    return {"model": TINY, "pretrained": None, "pool": None, "device": "cpu"} | changes


def test_a_store_is_written_in_the_order_of_ids(images, tmp_path):
    extract(images=images / "a", out=tmp_path / "store", **tiny())
    store = FeatureStore(tmp_path / "store")
    assert store.ids == ["0", "1", "2", "3", "4"]
    assert (store.tokens, store.dim) == (16, 512)
    features = store.gather(np.arange(5)).astype(np.float32)
    assert features.std() > 0.1  # batch norms have seen images: float16 can tell these features apart
    assert not np.allclose(features[0], features[1])


def test_features_do_not_depend_on_the_batch(images, tmp_path):
    extract(images=images / "a", out=tmp_path / "one", **tiny(batch_size=1))
    extract(images=images / "a", out=tmp_path / "all", **tiny(batch_size=64))
    one, all_ = (FeatureStore(tmp_path / name).gather(np.arange(5)).astype(np.float32) for name in ("one", "all"))
    np.testing.assert_allclose(one, all_, atol=2e-3)


def test_each_folder_becomes_a_store(images, tmp_path):
    extract(images=images, out=tmp_path / "features", each_folder=True, **tiny())
    assert FeatureStore(tmp_path / "features" / "a").ids == ["0", "1", "2", "3", "4"]
    assert FeatureStore(tmp_path / "features" / "b").ids == ["x"]


def test_the_grid_is_the_one_before_attention_pooling():
    extractor = Extractor(TINY, None, pool=None, resize="squash", device="cpu", seed=0)
    seen = []
    extractor.encoder.visual.attnpool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pixels = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        extractor.encoder.encode_image(pixels)
    assert torch.allclose(extractor(pixels), seen[0].flatten(2).transpose(1, 2), atol=1e-6)


def test_a_grid_is_max_pooled_on_request():
    whole = Extractor(TINY, None, pool=None, resize="squash", device="cpu", seed=0)
    pooled = Extractor(TINY, None, pool=2, resize="squash", device="cpu", seed=0)
    pixels = torch.rand(1, 3, 128, 128)
    expected = whole(pixels).reshape(1, 2, 2, 2, 2, 512).amax(dim=(2, 4)).reshape(1, 4, 512)
    assert torch.allclose(pooled(pixels), expected)


def test_a_vision_transformer_gives_its_patches(tmp_path):
    (tmp_path / "tiny_vit.json").write_text(json.dumps(VIT))
    extractor = Extractor(str(tmp_path / "tiny_vit.json"), None, pool=None, resize="squash", device="cpu", seed=0)
    assert (extractor.tokens, extractor.dim) == (16, 64)


def test_weights_come_from_a_file(images, tmp_path):
    extractor = Extractor(TINY, None, pool=None, resize="squash", device="cpu", seed=5)
    torch.save(extractor.encoder.state_dict(), tmp_path / "weights.pt")
    loaded = Extractor(TINY, str(tmp_path / "weights.pt"), pool=None, resize="squash", device="cpu", seed=0)
    pixels = torch.rand(1, 3, 128, 128)
    assert torch.equal(loaded(pixels), extractor(pixels))
    assert loaded.record["pretrained"] == "weights.pt"


def test_the_store_says_what_made_it(images, tmp_path):
    extract(images=images / "a", out=tmp_path / "store", **tiny(seed=7))
    record = FeatureStore(tmp_path / "store").meta["extractor"]
    assert record["library"] == f"open_clip {open_clip.__version__}"
    assert (record["model"], record["seed"], record["image_size"], record["resize"]) == ("tiny_rn", 7, 128, "squash")


def test_a_finished_store_is_left_as_it_is(images, tmp_path, capsys):
    extract(images=images / "a", out=tmp_path / "store", **tiny())
    before = (tmp_path / "store" / META).stat().st_mtime_ns
    extract(images=images / "a", out=tmp_path / "store", **tiny())
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "store" / META).stat().st_mtime_ns == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"pool": 2}])
def test_a_store_made_in_another_way_is_not_overwritten(images, tmp_path, change):
    extract(images=images / "a", out=tmp_path / "store", **tiny())
    with pytest.raises(FeatureStoreError, match="choose another --out"):
        extract(images=images / "a", out=tmp_path / "store", **tiny(**change))


def test_two_files_of_one_id_are_refused(tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "1.jpg")
    with pytest.raises(UnusableImages, match="have the same image id '1'"):
        find_images(tmp_path)


def test_files_that_are_no_images_are_counted_and_named_before_anything_is_written(images, tmp_path):
    (images / "a" / "bad.png").write_text("not a picture")
    with pytest.raises(UnusableImages, match=r"1 of 6 files are no images: .*bad\.png"):
        extract(images=images / "a", out=tmp_path / "store", **tiny())
    assert not (tmp_path / "store").exists()


def test_a_damaged_png_is_found(images, tmp_path):
    path = images / "a" / "1.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(UnusableImages, match="1 of 5 files are no images"):
        extract(images=images / "a", out=tmp_path / "store", **tiny())


def test_a_truncated_jpeg_is_named_and_leaves_no_store(images, tmp_path):
    path = images / "b" / "deep" / "x.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UnusableImages, match=r"x\.jpg cannot be read"):
        extract(images=images / "b", out=tmp_path / "store", **tiny())
    with pytest.raises(FeatureStoreError):
        FeatureStore(tmp_path / "store")


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no image in"):
        find_images(tmp_path)


def test_an_unknown_model_or_weights_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="unknown open_clip model 'RN9000': choose from"):
        extract(images=images / "a", out=tmp_path / "store", **tiny(model="RN9000"))
    with pytest.raises(ValueError, match="RN101 has no weights 'laion9b'"):
        extract(images=images / "a", out=tmp_path / "store", **tiny(model="RN101", pretrained="laion9b"))
    with pytest.raises(FileNotFoundError, match="no model config"):
        extract(images=images / "a", out=tmp_path / "store", **tiny(model="nowhere.json"))
