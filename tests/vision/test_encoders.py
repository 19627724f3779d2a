"""Encoders match open_clip on the same pixels."""

from importlib.metadata import version

import open_clip
import pytest
import torch
from PIL import Image

from tests.data_modules.extraction.tiny_media import RESNET, picture, write_vit
from vlpet_lightning.vision.encoders import CALIBRATION, Encoder, EncoderSettings, evenly, needs_quick_gelu, versions


@pytest.fixture
def images(tmp_path):
    return [Image.open(picture(tmp_path / f"{n}.png", n, size)) for n, size in enumerate([(50, 40), (300, 200)])]


def plain(encoder, images, features):
    """Compute features with open_clip's own preprocessing and forward, without our code."""
    cfg = open_clip.get_model_preprocess_cfg(encoder.model)
    transform = open_clip.image_transform(
        cfg["size"], is_train=False, mean=cfg["mean"], std=cfg["std"], resize_mode="squash", interpolation="bicubic"
    )
    pixels = torch.stack([transform(image) for image in images])
    visual, seen = encoder.model.visual, []
    with torch.no_grad():
        if features == "embedding":
            return encoder.model.encode_image(pixels)[:, None]
        if hasattr(visual, "attnpool"):
            handle = visual.attnpool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            visual(pixels)
            handle.remove()
            return seen[0].flatten(2).transpose(1, 2)
        handle = visual.ln_post.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        visual(pixels)
        handle.remove()
        given, normed = seen[0]
        return (normed if given.ndim == 3 else visual.ln_post(given))[:, 1:]


def check(model, images, features, tokens, dim):
    encoder = Encoder(EncoderSettings(model, features=features))
    assert (encoder.tokens, encoder.dim) == (tokens, dim)
    given = encoder(torch.stack([encoder.pixels(image) for image in images]))
    torch.testing.assert_close(given, plain(encoder, images, features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("features", "tokens", "dim"), [("grid", 16, 512), ("embedding", 1, 64)])
def test_a_resnet_gives_its_grid_before_attention_pooling_or_its_embedding(images, features, tokens, dim):
    check(RESNET, images, features, tokens, dim)


@pytest.mark.parametrize(("features", "tokens", "dim"), [("grid", 16, 64), ("embedding", 1, 32)])
def test_a_vision_transformer_gives_its_patches_or_its_embedding(images, tmp_path, features, tokens, dim):
    check(write_vit(tmp_path / "tiny_vit.json"), images, features, tokens, dim)


@pytest.mark.parametrize(
    ("model", "features", "tokens", "dim"),
    [("RN101", "grid", 49, 2048), ("ViT-B-32", "grid", 49, 768), ("ViT-B-32", "embedding", 1, 512)],
)
def test_the_benchmarks_encoders_are_open_clips(images, model, features, tokens, dim):
    check(model, images, features, tokens, dim)


def test_pixels_are_normalised_to_the_bit_as_open_clip_does(images):
    encoder, seen = Encoder(EncoderSettings(RESNET)), []
    encoder.model.visual.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder.model.visual.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder(torch.stack([encoder.pixels(image) for image in images]))
    assert torch.equal(seen[0], torch.stack([encoder.transform(image) for image in images]))


def test_a_grid_is_max_pooled_on_request():
    whole, pooled = (Encoder(EncoderSettings(RESNET, pool=pool)) for pool in (None, 2))
    pixels = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    expected = whole(pixels).reshape(1, 2, 2, 2, 2, 512).amax(dim=(2, 4)).reshape(1, 4, 512)
    assert torch.allclose(pooled(pixels), expected)


def test_bf16_differs_by_its_digits_and_no_more(tmp_path):
    model = write_vit(tmp_path / "tiny_vit.json")
    exact, quick = (Encoder(EncoderSettings(model, precision=precision)) for precision in ("float32", "bf16"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert not torch.equal(quick(pixels), exact(pixels))
    torch.testing.assert_close(quick(pixels), exact(pixels), rtol=0.05, atol=0.05)
    assert quick.record["precision"] == "bf16"


def test_weights_come_from_a_file_and_are_recorded_by_checksum(tmp_path):
    encoder = Encoder(EncoderSettings(RESNET, seed=5))
    torch.save(encoder.model.state_dict(), tmp_path / "weights.pt")
    loaded = Encoder(EncoderSettings(RESNET, str(tmp_path / "weights.pt")))
    pixels = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    assert torch.equal(loaded(pixels), encoder(pixels))
    assert (loaded.record["pretrained"], loaded.record["seed"]) == ("weights.pt", None)
    assert len(loaded.record["weights_sha256"]) == 64
    assert not loaded.needs_calibration


def test_openais_weights_get_the_activation_they_were_trained_with():
    assert needs_quick_gelu("ViT-B-32", "openai")
    assert not needs_quick_gelu("ViT-B-32", "laion2b_s34b_b79k")


def test_calibration_is_the_same_from_its_file(images, tmp_path):
    calibrated, loaded = (Encoder(EncoderSettings(RESNET)) for _ in range(2))
    pixels = [calibrated.pixels(image) for image in images]
    before = calibrated(torch.stack(pixels))
    calibrated.calibrate(evenly(pixels))
    calibrated.save_calibration(tmp_path / "statistics")
    loaded.load_calibration(tmp_path / "statistics")
    assert torch.equal(loaded(torch.stack(pixels)), calibrated(torch.stack(pixels)))
    assert calibrated(torch.stack(pixels)).std() > 10 * before.std()


def test_items_are_chosen_evenly_from_the_first_to_the_last():
    chosen = evenly(range(1000))
    assert (len(chosen), chosen[0], chosen[-1]) == (CALIBRATION, 0, 999)
    assert evenly([]) == []


def test_versions_leave_out_what_is_not_installed():
    # the wheel's version; torch.__version__ includes CUDA, too
    assert versions("torch", "no-such-package") == f"torch {version('torch')}"


def test_an_unknown_model_or_weights_are_refused():
    with pytest.raises(ValueError, match="unknown open_clip model 'RN9000': choose from"):
        Encoder(EncoderSettings("RN9000"))
    with pytest.raises(ValueError, match="RN101 has no weights 'laion9b'"):
        Encoder(EncoderSettings("RN101", "laion9b"))
    with pytest.raises(FileNotFoundError, match="no model config"):
        Encoder(EncoderSettings("nowhere.json"))
