"""Features of a model's own vision tower, from image files to logits."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from transformers import LlavaOnevisionConfig

from data_modules import FeatureStore
from data_modules.extraction.commands import extract_images
from tests.backbones.tiny_vlm import LLAVA, QWEN_SIZE, SAVED, SIGLIP, save, save_smolvlm
from vlpet_lightning import Predictor, VLCausal, save_pet
from vlpet_lightning.__main__ import run
from vlpet_lightning.answers import top_answers
from vlpet_lightning.api import make_batch
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.backbones.image_processor import load_image_processor
from vlpet_lightning.inputs import text_batch
from vlpet_lightning.interop.export.record import add_features
from vlpet_lightning.pet import VLPET, Placement
from vlpet_lightning.tasks import task
from vlpet_lightning.vision.choice import make_encoder
from vlpet_lightning.vision.encoders import EncoderSettings
from vlpet_lightning.vision.features import build_encoder, features_record, read_features_record

FLOAT16 = 1e-3  # error of the logits relative to the largest one, with features rounded to float16


@pytest.fixture(scope="module", params=sorted(SAVED))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each model."""
    return {name: save(name, tmp_path_factory.mktemp(name.replace(" ", "_"))) for name in SAVED}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        pixels = torch.randint(256, (20, 30 + number, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def stores(folders, pictures, tmp_path_factory):
    """The feature store of each model."""
    out = tmp_path_factory.mktemp("features")
    for name, folder in folders.items():
        settings = SAVED[name].settings
        extract_images(source=pictures, out=out / name, model=f"hf:{folder}", workers=0, device="cpu", **settings)
    return {name: out / name for name in folders}


@pytest.fixture(scope="module")
def folder(folders):
    return folders["smolvlm"]


@pytest.fixture(scope="module")
def store(stores):
    return stores["smolvlm"]


def module_of(name, folder, **settings):
    module = VLCausal(str(folder), trainable=["visual_embedding"], **SAVED[name].settings | settings)
    module.loads_whole_backbone = True
    module.configure_model()
    return module


def encoder_of(name, folder):
    settings = EncoderSettings(f"hf:{folder}", features="projector_input", image_settings=SAVED[name].settings)
    return make_encoder(settings)


def library_logits(name, module, images, batch):
    """Return the logits of the library's model for some images, at the first two tokens of the answer."""
    saved, tokens = SAVED[name], module.tokenizer
    text = saved.image(module.model.visual.per_image) * len(images)
    before, after = (
        tokens(part.format(image=text), add_special_tokens=False)["input_ids"] for part in saved.prompt.split("{text}")
    )
    words = batch.input_ids[0, :-1].tolist()  # without the end token
    ids = torch.tensor([[*before, *words, *after, batch.labels[0, 0].item()]])
    processor, places = load_image_processor(module.backbone_name), ids == tokens.convert_tokens_to_ids(saved.marks[1])
    inputs = [saved.inputs(processor, image, places) for image in images]
    if len(inputs) > 1:
        inputs = [{"pixel_values": torch.cat([one["pixel_values"] for one in inputs], dim=1)}]
    with torch.no_grad():
        return module.model.lm(input_ids=ids, **inputs[0]).logits[0, -2:]


def test_logits_from_features_are_those_of_the_model_on_the_image_file(kind, folders, pictures, stores):
    module = module_of(kind, folders[kind])
    encoder = encoder_of(kind, folders[kind])
    features = FeatureStore(stores[kind])
    stored = torch.from_numpy(features.gather(features.rows(["1"]))).float()
    with Image.open(pictures / "1.png") as file:
        image = file.convert("RGB")
    exact = encoder(encoder.pixels(image)[None])
    for found, error in ((exact, 1e-4), (stored, FLOAT16)):
        batch = make_batch(module, "vqa", ["what color ?"], found, ["red"])
        expected = library_logits(kind, module, [image], batch)
        with torch.no_grad():
            logits = module.model.eval()(batch)[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=error * expected.abs().max().item())


def test_two_divided_images_are_those_of_the_library(folders, pictures, stores):
    module = module_of("smolvlm tiled", folders["smolvlm tiled"])
    encoder = encoder_of("smolvlm tiled", folders["smolvlm tiled"])
    files = [Image.open(pictures / name).convert("RGB") for name in ("0.png", "2.png")]
    features = encoder(torch.stack([encoder.pixels(image) for image in files]))[None]
    batch = make_batch(module, "nlvr2", ["what color ?"], features, ["true"])
    expected = library_logits("smolvlm tiled", module, files, batch)
    with torch.no_grad():
        torch.testing.assert_close(module.model.eval()(batch)[0, :2], expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_an_image_are_told_from_line_breaks_and_from_tiles(kind, folders, stores):
    module = module_of(kind, folders[kind])
    model, config = module.model.eval(), module.model.lm.config
    stored = FeatureStore(stores[kind])
    features = torch.from_numpy(stored.gather(stored.rows(["1"]))).float()
    with torch.no_grad():
        tokens = model.visual(features, None, model.backbone.token_embedding(model.lm))[0]
        breaks = getattr(model.lm.model, "image_newline", tokens.new_full(tokens.shape[1:], torch.nan))
        patches = model.backbone.patch_tokens(config)
        assert torch.equal((tokens == breaks).all(dim=1), ~patches)
        view = model.backbone.whole_view(config)
        views = features[0].unflatten(0, (getattr(model.backbone, "views", 1), -1))
        whole = features[:, : len(features[0]) // 7] if kind == "llava tiled" else views[-1:]
        projected = model.backbone.projector(model.lm)(whole).flatten(0, -2)
    torch.testing.assert_close(tokens[view], projected)
    assert patches[view].all()


def test_the_record_of_a_store_names_the_tower(folder, store):
    record = json.loads((store / "meta.json").read_text())
    extractor = record["extractor"]
    assert (record["tokens"], record["dim"]) == (4, 8)
    assert extractor["model"] == f"hf:{folder.name}"
    assert extractor["features"] == "projector_input"
    assert extractor["image_size"] == [16, 16]
    assert extractor["processing"]["do_image_splitting"] is False
    assert len(extractor["tower_fingerprint"]) == 64


@pytest.mark.parametrize(
    ("kind", "shape", "extractor"),
    [
        ("qwen2.5", (96, 24), {"image_size": list(QWEN_SIZE)}),
        ("smolvlm", (4, 8), {"image_size": [16, 16], "tiling": None}),
        ("smolvlm tiled", (28, 8), {"image_size": [16, 16], "tiling": [2, 3]}),
        ("llava tiled", (28, 24), {"image_size": [16, 16], "tiling": [2, 3]}),
    ],
)
def test_the_record_of_a_store_has_the_image_settings(stores, kind, shape, extractor):
    record = json.loads((stores[kind] / "meta.json").read_text())
    assert (record["tokens"], record["dim"]) == shape
    assert record["extractor"] | extractor == record["extractor"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (EncoderSettings("RN50", features="projector_input"), ValueError, "is for models of Hugging Face"),
        (EncoderSettings("hf:{}", features="grid"), ValueError, "add --features projector_input --pool null"),
        (EncoderSettings("hf:facebook/bart-base", features="projector_input"), ValueError, "has no vision tower"),
    ],
)
def test_settings_that_do_not_apply_are_refused(folder, settings, error, message):
    settings = EncoderSettings(settings.model.format(folder), features=settings.features)
    with pytest.raises(error, match=message):
        make_encoder(settings)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("smolvlm", {"image_size": [448, 448]}, r"image_size is \[448, 448\]: a smolvlm model has its own, omit it"),
        ("qwen2.5", {}, r"takes images of any size: set image_size, \[height, width\] in pixels"),
        ("qwen2.5", {"image_size": [448]}, r"image_size must be \[height, width\], got \[448\]"),
        (
            "qwen2.5",
            {"image_size": [48, 36]},
            "images of 48 x 36 pixels cannot be divided into tokens of 8 x 8: resize",
        ),
        (
            "RN50",
            {"image_size": [448, 448]},
            r"--image_size is for models of Hugging Face \(--model hf:NAME\): omit it",
        ),
        ("qwen2.5", {"tiling": [2, 2]}, r"tiling is \[2, 2\]: images of a qwen2_5_vl model are not divided, omit it"),
        ("smolvlm", {"tiling": [2, 0]}, r"tiling must be \[rows, columns\], got \[2, 0\]"),
        ("smolvlm", {"tiling": [1, 1]}, r"tiling is \[1, 1\], which the library does not divide: omit it"),
        ("llava", {"tiling": [3, 3]}, r"tiling is \[3, 3\], which .* \(image_grid_pinpoints has no 48 x 48 pixels\)"),
        ("RN50", {"tiling": [2, 2]}, r"--tiling is for models of Hugging Face \(--model hf:NAME\): omit it with RN50"),
    ],
)
def test_image_settings_that_do_not_apply_are_refused(folders, pictures, tmp_path, model, settings, message):
    name = f"hf:{folders[model]}" if model in folders else model
    with pytest.raises(ValueError, match=message):
        extract_images(source=pictures, out=tmp_path / "out", model=name, workers=0, device="cpu", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_aspect_ratio": "anyres_max_4"}, "anyres_max_4 shrinks the features of so many tiles"),
        ({"vision_feature_select_strategy": "default"}, "a view has 3 vectors of 4 patches"),
    ],
)
def test_tiles_whose_features_the_library_changes_are_refused(folders, settings, message):
    family = BACKBONES["llava_onevision"].with_sizes(SAVED["llava tiled"].settings)
    config = family.config(str(folders["llava"]))
    config.update(settings)
    with pytest.raises(ValueError, match=rf"tiling is \[2, 3\], which does not fit config.json \({message}\)"):
        family.vectors(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tiling": [3, 3]}, "has no token .<row_3_col_1>., which the prompt needs: .*, or choose fewer tiles"),
        ({"tiling": [2, 3], "image_template": "<image>{tokens}"}, r"must have \{tokens\} 7 times"),
    ],
)
def test_tiles_that_the_prompt_cannot_name_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        module_of("smolvlm", folder, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("qwen2.5", {"patch_size": 8}, "divides 48 x 32 pixels into 6 x 4 patches, merged by 2, the model into 12 x 8"),
        ("qwen2.5", {"merge_size": 4}, "12 x 8 patches, merged by 4, the model into 12 x 8, merged by 2: set patch"),
        (
            "smolvlm",
            {"max_image_size": {"longest_edge": 32}},
            "makes 32 x 32 pixels of an image, the tower reads 16 x 16",
        ),
        ("smolvlm tiled", {"max_image_size": {"longest_edge": 32}}, "makes 32 x 32 pixels .*, the tower reads 16 x 16"),
        (
            "llava",
            {"size": {"height": 32, "width": 32}},
            "makes 32 x 32 pixels of an image, the tower reads 16 x 16: set",
        ),
        (
            "llava tiled",
            {"size": {"height": 32, "width": 32}},
            "makes 32 x 32 pixels of an image, the tower reads 16 x 16",
        ),
    ],
)
def test_an_image_processor_of_another_model_is_refused(folders, tmp_path, kind, settings, message):
    other = shutil.copytree(folders[kind], tmp_path / "other")
    processor = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(processor | settings))
    with pytest.raises(ValueError, match=message):
        encoder_of(kind, other)


def test_a_missing_image_processor_is_one_sentence(folder, tmp_path):
    for file in folder.iterdir():
        if "processor" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=r"no image processor of .*preprocessor_config\.json"):
        make_encoder(EncoderSettings(f"hf:{tmp_path}", features="projector_input"))


class Data(LightningDataModule):
    """Data of one feature store."""

    def __init__(self, store):
        super().__init__()
        self.tasks = {"vqa": None}
        self.meta = json.loads((store / "meta.json").read_text())

    def store(self, spec, split):
        return SimpleNamespace(meta=self.meta)


@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
def test_features_of_another_tower_are_refused(folder, store, tmp_path, frozen_dtype):
    other = save_smolvlm(tmp_path / "other", seed=1)
    for name, refused in ((folder, False), (other, True)):
        module = VLCausal(str(name), trainable=["visual_embedding"], frozen_dtype=frozen_dtype)
        module.configure_model()
        module._trainer = SimpleNamespace(datamodule=Data(store), state=SimpleNamespace(fn="fit"))
        with pytest.raises(ValueError, match="not of the tower of") if refused else nullcontext():
            module.check_features(module._trainer.datamodule)


@pytest.mark.parametrize(
    ("kind", "setting", "refused"),
    [
        ("qwen2.5", {"image_size": [48, 32]}, None),
        ("qwen2.5", {"image_size": [32, 48]}, r"with image_size \[48, 32\], the model has \[32, 48\]: set the model's"),
        ("smolvlm tiled", {"tiling": [2, 3]}, None),
        ("smolvlm tiled", {"tiling": [2, 2]}, r"with tiling \[2, 3\], the model has \[2, 2\]: set the model's tiling"),
        ("smolvlm tiled", {"tiling": None}, r"with tiling \[2, 3\], the model has None: set the model's tiling"),
        ("llava", {"tiling": [2, 3]}, r"with tiling None, the model has \[2, 3\]: set the model's tiling"),
    ],
)
def test_features_of_other_image_settings_are_refused(folders, stores, kind, setting, refused):
    module = module_of(kind, folders[kind], **setting)
    module._trainer = SimpleNamespace(datamodule=Data(stores[kind]), state=SimpleNamespace(fn="fit"))
    with (
        nullcontext() if refused is None else pytest.raises(ValueError, match=f"the train features of vqa .* {refused}")
    ):
        module.check_features(module._trainer.datamodule)


@pytest.fixture(scope="module")
def exported(kind, folders, stores, tmp_path_factory):
    """An untrained export whose features are those of the model's own tower."""
    out = tmp_path_factory.mktemp("export")
    units = [Placement(["decoder.attn"], VLPET.with_(rank=4))]
    module = VLCausal(str(folders[kind]), units, ["pet"], **SAVED[kind].settings)
    module.configure_model()
    save_pet(module, out)
    meta = features_record(json.loads((stores[kind] / "meta.json").read_text()))
    add_features(out, dict.fromkeys(("vqa", "caption", "nlvr2"), meta))
    return out


def test_a_picture_gets_the_answer_of_its_stored_features(kind, exported, pictures, stores):
    predictor = Predictor(exported, device="cpu")
    features = FeatureStore(stores[kind])
    files = [pictures / f"{number}.png" for number in range(3)]
    stored = torch.from_numpy(features.gather(features.rows(["0", "1", "2"])))
    torch.testing.assert_close(predictor.encode(files), stored, rtol=1e-3, atol=1e-3)
    assert predictor.encoders["vqa"].model is predictor.model.lm  # loaded once
    answers = predictor([*files], "What thing ?", top=2)
    batch = text_batch(predictor.tokenizer, task("vqa"), ["What thing ?"] * 3, stored)
    expected = top_answers(predictor.model, predictor.tokenizer, batch, 2)
    assert [[one.text for one in some] for some in answers] == [[one.text for one in some] for some in expected]
    assert isinstance(predictor((files[0], files[1]), "What thing ?"), str)


def test_ask_answers_about_an_image_file(exported, pictures, capsys):
    words = ["--model", str(exported), "--image", str(pictures / "0.png"), "What thing ?", "--top", "2", "--json"]
    assert run(["ask", *words, "--device", "cpu"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert len(found["answers"]) == 2
    assert found["answers"][0]["probability"] >= found["answers"][1]["probability"]


def test_pictures_are_not_processed_in_another_way(kind, exported, folders, tmp_path):
    other = shutil.copytree(folders[kind], tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.0, 0.0, 0.0]}))
    with pytest.raises(ValueError, match=r"trained on features of hf:.*other differs in processing: give the model"):
        Predictor(exported, str(other), device="cpu")


def test_tower_of_other_weights_is_refused(folder, store, tmp_path):
    extractor = json.loads((store / "meta.json").read_text())["extractor"]
    other = make_encoder(EncoderSettings(f"hf:{save_smolvlm(tmp_path / 'other', seed=1)}", features="projector_input"))
    with pytest.raises(ValueError, match="differs in tower_fingerprint: give"):
        other.check(extractor)


@pytest.mark.parametrize("kind", ["qwen2.5", "smolvlm tiled"])
def test_the_encoder_of_a_record_has_the_image_settings_of_the_record(kind, folders, stores):
    record = read_features_record(stores[kind])
    extractor = record["extractor"] | {"model": f"hf:{folders[kind]}"}
    assert build_encoder(record | {"extractor": extractor}).tokens == record["tokens"]


@pytest.mark.parametrize(
    ("layers", "strategy", "tower"),
    [
        (-2, "full", "siglip_vision_model"),
        ([-2, -1], "full", "siglip_vision_model"),
        (1, "default", "siglip_vision_model"),
        ([0, -1], "default", "clip_vision_model"),
        (-1, "full", "clip_vision_model"),
    ],
)
def test_llava_reads_the_layers_and_states_of_its_configuration(layers, strategy, tower):
    config = LlavaOnevisionConfig(
        text_config=LLAVA.config.text_config.to_dict(),
        vision_config=SIGLIP | {"model_type": tower, "num_hidden_layers": 2},
        vision_feature_layer=layers,
        vision_feature_select_strategy=strategy,
    )
    family = BACKBONES["llava_onevision"]
    torch.manual_seed(0)
    lm = family.build(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        sizes, images = torch.full((2, 2), 32), torch.tensor([2])
        expected = lm.model.get_image_features(pixels, sizes, batch_num_images=images).pooler_output
        features = family.tower_output(lm, pixels)
        found = family.visual_embedding(lm, features.shape[-1], None)(features, None, torch.empty(0, 32))
    assert features.shape[1:] == (family.vectors(config), family.feature_dim(config))
    torch.testing.assert_close(found, torch.stack(list(expected)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "words", "tokens"), [("smolvlm", ["--tiling", "[2,3]"], 28), ("qwen2.5", ["--image_size", "[16,24]"], 24)]
)
def test_the_command_takes_image_settings(kind, words, tokens, folders, pictures, tmp_path):
    places = ["--source", str(pictures), "--out", str(tmp_path / "out"), "--model", f"hf:{folders[kind]}"]
    assert run(["data", "extract", "images", *places, *words, "--device", "cpu"]) == 0
    assert FeatureStore(tmp_path / "out").tokens == tokens
