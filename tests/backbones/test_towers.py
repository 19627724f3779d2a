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

from data_modules import FeatureStore
from data_modules.extraction.commands import extract_images
from tests.backbones.tiny_vlm import save_smolvlm
from vlpet_lightning import Predictor, VLCausal, save_pet
from vlpet_lightning.__main__ import run
from vlpet_lightning.answers import top_answers
from vlpet_lightning.api import make_batch
from vlpet_lightning.inputs import text_batch
from vlpet_lightning.interop.export.record import add_features
from vlpet_lightning.pet import VLPET, Placement
from vlpet_lightning.tasks import task
from vlpet_lightning.vision.choice import make_encoder
from vlpet_lightning.vision.encoders import EncoderSettings
from vlpet_lightning.vision.features import features_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        pixels = torch.randint(256, (20, 30 + number, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def store(folder, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "store"
    extract_images(source=pictures, out=out, model=f"hf:{folder}", rows="float16", workers=0, device="cpu")
    return out


def test_logits_from_the_store_are_those_of_the_model_on_the_image_file(folder, pictures, store):
    module = VLCausal(str(folder), trainable=["visual_embedding"])
    module.loads_whole_backbone = True
    module.configure_model()
    model, processor = module.model.eval(), make_encoder(EncoderSettings(f"hf:{folder}", features="projector_input"))
    features = FeatureStore(store)
    stored = torch.from_numpy(features.gather(features.rows(["1"]))).float()
    batch = make_batch(module, "vqa", ["what color ?"], stored, ["red"])
    tokens = module.tokenizer
    text = tokens.convert_ids_to_tokens(batch.input_ids[0])[:-1]
    prompt = ["<|im_start|>", "User", ":", "<fake_token_around_image>", "<global-img>", "<image>"]
    prompt += ["<fake_token_around_image>", *text, "<end_of_utterance>", "Assistant", ":"]
    ids = torch.tensor([tokens.convert_tokens_to_ids(prompt) + batch.labels[0, :1].tolist()])
    with Image.open(pictures / "1.png") as image:
        inputs = processor.processor(images=[[image.convert("RGB")]], do_image_splitting=False, return_tensors="pt")
    with torch.no_grad():
        expected = model.lm(input_ids=ids, **inputs).logits[0, -2:]
        torch.testing.assert_close(model(batch)[0], expected, rtol=1e-3, atol=1e-3)  # stored in float16


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
            module.check_features()


@pytest.fixture(scope="module")
def exported(folder, store, tmp_path_factory):
    """An untrained export whose features are those of the model's own tower."""
    out = tmp_path_factory.mktemp("export")
    module = VLCausal(str(folder), [Placement(["decoder.attn"], VLPET.with_(rank=4))], ["pet", "visual_embedding"])
    module.configure_model()
    save_pet(module, out)
    meta = features_record(json.loads((store / "meta.json").read_text()))
    add_features(out, dict.fromkeys(("vqa", "caption", "nlvr2"), meta))
    return out


def test_a_picture_gets_the_answer_of_its_stored_features(exported, folder, pictures, store):
    predictor = Predictor(exported, device="cpu")
    features = FeatureStore(store)
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


def test_pictures_are_not_processed_in_another_way(exported, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.0, 0.0, 0.0]}))
    with pytest.raises(ValueError, match=r"trained on features of hf:.*other differs in processing: give the model"):
        Predictor(exported, str(other), device="cpu")


def test_tower_of_other_weights_is_refused(folder, store, tmp_path):
    extractor = json.loads((store / "meta.json").read_text())["extractor"]
    other = make_encoder(EncoderSettings(f"hf:{save_smolvlm(tmp_path / 'other', seed=1)}", features="projector_input"))
    with pytest.raises(ValueError, match="differs in tower_fingerprint: give"):
        other.check(extractor)
