"""Users' images: depth, transparency, orientation, frames and suffixes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from data_modules.extraction.commands import extract_images
from data_modules.extraction.media import Images, other_suffixes, several_frames
from data_modules.store.store import FeatureStore
from tests.data_modules.extraction.tiny_media import RESNET
from vlpet_lightning.vision.images import read_image

SIDE = 64
RAMP = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1))
COLOURS = np.stack([RAMP, RAMP.T, 1 - RAMP], axis=-1)
LEVEL = 1 / 255


def pixels(path, **options):
    return np.asarray(read_image(path, **options)).astype(float) / 255


def eight_bits(values):
    return (255 * values).round().astype(np.uint8)


@pytest.fixture
def ramps(tmp_path):
    """Write a grey ramp in 8 bits, 16 bits (PNG and TIFF), 32-bit integers and float."""
    folder = tmp_path / "ramps"
    folder.mkdir()
    Image.fromarray(eight_bits(RAMP)).save(folder / "eight.png")
    deep = (65535 * RAMP).round().astype(np.uint16)
    Image.fromarray(deep).save(folder / "sixteen.png")
    Image.fromarray(deep).save(folder / "sixteen_tiff.tiff")
    Image.fromarray((100_000 * RAMP).round().astype(np.int32)).save(folder / "integers.tiff")
    Image.fromarray(RAMP.astype(np.float32)).save(folder / "float.tif")
    return folder


@pytest.mark.parametrize("name", ["sixteen.png", "sixteen_tiff.tiff", "integers.tiff", "float.tif"])
def test_a_deep_ramp_has_the_pixels_of_the_8_bit_one_to_rounding(ramps, name):
    assert np.abs(pixels(ramps / name) - pixels(ramps / "eight.png")).max() <= LEVEL + 1e-9


def test_a_deep_image_is_scaled_by_its_own_range(tmp_path):
    Image.fromarray((1000 + 3095 * RAMP).round().astype(np.uint16)).save(tmp_path / "twelve.png")
    found = pixels(tmp_path / "twelve.png")
    assert found.min() == 0
    assert found.max() == 1
    assert np.abs(found[..., 0] - RAMP).max() <= LEVEL


@pytest.mark.parametrize(("value", "kind", "level"), [(65535, np.uint16, 1), (0, np.uint16, 0), (1.0, np.float32, 1)])
def test_a_deep_image_of_one_value_is_scaled_by_its_type(tmp_path, value, kind, level):
    Image.fromarray(np.full((8, 8), value, dtype=kind)).save(tmp_path / "flat.tiff")
    assert (pixels(tmp_path / "flat.tiff") == level).all()


def test_a_float_image_with_nan_is_refused(tmp_path):
    values = RAMP.astype(np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tiff")
    with pytest.raises(ValueError, match="values that are not finite"):
        read_image(tmp_path / "nan.tiff")


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparent_pixels_are_composited_over_white(tmp_path, alpha):
    colours = eight_bits(COLOURS)
    Image.fromarray(np.dstack([colours, np.full((SIDE, SIDE), alpha, np.uint8)])).save(tmp_path / "some.png")
    expected = 1 - alpha / 255 * (1 - colours / 255)
    assert np.abs(pixels(tmp_path / "some.png") - expected).max() <= LEVEL + 1e-9


def test_a_palette_with_a_transparent_entry_is_composited_over_white(tmp_path):
    image = Image.fromarray(np.repeat([0, 1], 32).astype(np.uint8).reshape(8, 8), mode="P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "palette.png", transparency=1)
    found = pixels(tmp_path / "palette.png")
    assert (found[0] == [1, 0, 0]).all()
    assert (found[-1] == [1, 1, 1]).all()


@pytest.fixture
def turned(tmp_path):
    """Write a picture upright, and stored rotated with EXIF orientation 6."""
    upright = Image.fromarray(eight_bits(COLOURS[:32]))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[274] = 6
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    return tmp_path


def test_exif_orientation_is_followed_and_can_be_turned_off(turned):
    upright = pixels(turned / "upright.png")
    assert (pixels(turned / "turned.png") == upright).all()
    raw = pixels(turned / "turned.png", exif_orientation=False)
    assert (raw == np.rot90(upright)).all()


def test_the_first_of_several_frames_is_read(tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "two.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "one.gif")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    assert (pixels(tmp_path / "two.gif") == [1, 0, 0]).all()
    assert several_frames(sorted(tmp_path.iterdir())) == [tmp_path / "two.gif"]


def test_files_with_other_suffixes_are_counted_by_suffix(tmp_path):
    for name in ("a.png", "b.txt", "c.TXT", "d.pdf", "below/e.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert other_suffixes(tmp_path, Images()) == {".txt": 3, ".pdf": 1, "without a suffix": 1}


def test_features_of_a_deep_image_equal_those_of_the_8_bit_one_and_the_record_says_how(ramps, tmp_path, capsys):
    (ramps / "notes.txt").touch()
    Image.new("RGB", (8, 8), "red").save(ramps / "two.gif", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    extract_images(source=ramps, out=tmp_path / "store", model=RESNET, pretrained=None, pool=None)
    printed = capsys.readouterr().out
    assert "1 file with another suffix left out: .txt (1)" in printed
    assert "the first of several frames is read of 1 image: two.gif" in printed
    store = FeatureStore(tmp_path / "store")
    eight = store.gather(store.rows(["eight"]))
    for name in ("sixteen", "sixteen_tiff", "integers", "float"):
        assert np.abs(store.gather(store.rows([name])) - eight).max() <= 0.02 * np.abs(eight).max()
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    assert meta["extractor"]["exif_orientation"] is True
    assert meta["extractor"]["transparency"] == "composited over white"
