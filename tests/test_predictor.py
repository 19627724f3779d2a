"""Questions about image files: the Predictor and the ``ask`` command, on a run trained on extracted features."""

from __future__ import annotations

import csv
import doctest
import itertools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_modules.extraction.commands import extract_images
from tests.data_modules.tiny_data import write_world
from vlpet_lightning import Predictor
from vlpet_lightning.__main__ import run
from vlpet_lightning.answers import sequence_probabilities
from vlpet_lightning.prediction_files import read_predictions
from vlpet_lightning.tasks import task

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESNET = EXPERIMENTS / "clip" / "tiny_rn.json"


class Trained(NamedTuple):
    """A run on the features of generated pictures, and its export."""

    pictures: Path  # with COCO/ and nlvr/
    root: Path
    checkpoint: Path
    export: Path
    said: dict[str, list[dict[str, Any]]]  # predictions of the test splits


def draw(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 80)).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Trained:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    for store in ("COCO", "nlvr"):
        ids = np.load(root / "features" / store / "ids.npy").astype(str).tolist()
        draw(root / "pictures" / store, ids)
        shutil.rmtree(root / "features" / store)
        source, out = root / "pictures" / store, root / "features" / store
        extract_images(source=source, out=out, model=str(RESNET), pretrained=None, pool=2, device="cpu")
    overlay = {
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "logger": {
                "class_path": "vlpet_lightning.loggers.CSVLog",
                "init_args": {"save_dir": str(root), "name": "run", "version": "a"},
            },
            "callbacks": [
                {"class_path": "callbacks.PredictionWriter"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
            ],
        },
        "model": {"init_args": {"backbone": str(tiny_backbone), "feature_dim": 512, "grid": 2, "lr": 0.02}},
        "data": {
            "init_args": {
                "root": str(root),
                "batch_size": 3,
                "tasks": ["vqa", "nlvr2", "caption"],
                "prompts": {"vqa": "what is "},
            }
        },
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    words = ["--config", str(EXPERIMENTS / "image_text.yaml"), "--config", str(root / "tiny.yaml")]
    checkpoint = root / "run" / "a" / "checkpoints" / "last.ckpt"
    assert run(["fit", *words]) == 0
    assert run(["test", *words, "--ckpt_path", str(checkpoint)]) == 0
    assert run(["export", "--ckpt_path", str(checkpoint), "--out", str(root / "export")]) == 0
    folder = root / "run" / "a" / "predictions"
    said = {name: read_predictions(folder / f"test_{name}.json").records for name in ("vqa", "nlvr2", "caption")}
    return Trained(root / "pictures", root, checkpoint, root / "export", said)


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return Predictor(trained.export, device="cpu")


def pictures(trained: Trained, record: dict[str, Any]) -> Any:
    store = "nlvr" if len(record["images"]) == 2 else "COCO"
    files = tuple(trained.pictures / store / f"{name}.png" for name in record["images"])
    return files if len(files) == 2 else files[0]


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "caption"])
def test_a_picture_gets_the_answer_that_the_run_gave_its_stored_features(
    name: str, trained: Trained, predictor: Predictor
) -> None:
    for record in trained.said[name]:
        assert predictor(pictures(trained, record), record["text"]) == record["prediction"]


def test_the_features_of_a_picture_are_those_of_the_store(trained: Trained, predictor: Predictor) -> None:
    from data_modules import FeatureStore

    for folder, asked in (("COCO", "vqa"), ("nlvr", "nlvr2"), ("COCO", "caption")):  # each with its own statistics
        store = FeatureStore(trained.root / "features" / folder)
        name = trained.said[asked][0]["images"][0]
        stored = torch.as_tensor(store.gather(store.rows([name])))
        ours = predictor.encode([trained.pictures / folder / f"{name}.png"], asked)
        assert torch.allclose(ours.float(), stored.float(), rtol=2e-3, atol=2e-3)
    assert predictor.encoders["vqa"] is predictor.encoders["caption"] is not predictor.encoders["nlvr2"]


def test_statistics_of_another_encoder_are_refused(trained: Trained, tmp_path: Path) -> None:
    copy = damaged(trained, tmp_path)
    shutil.copyfile(
        copy / "encoder" / "nlvr2" / "calibration.safetensors", copy / "encoder" / "calibration.safetensors"
    )
    with pytest.raises(ValueError, match=r"calibration.safetensors is damaged or of another encoder"):
        Predictor(copy, device="cpu")


def test_a_picture_of_several_questions_is_encoded_once(
    trained: Trained, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, shapes = predictor.encoders["vqa"], []
    monkeypatch.setitem(predictor.encoders, "vqa", lambda pixels: shapes.append(len(pixels)) or encoder(pixels))
    monkeypatch.setattr(predictor.encoders["vqa"], "pixels", encoder.pixels, raising=False)
    one, other = (pictures(trained, record) for record in trained.said["vqa"][:2])
    together = predictor.encode([one, other, one, one], "vqa")
    assert shapes == [2]
    assert torch.equal(together[[0, 2, 3]], together[:1].expand(3, -1, -1))
    assert not torch.equal(together[0], together[1])


def test_a_store_may_be_given_for_some_of_the_tasks(trained: Trained, tmp_path: Path) -> None:
    copy = damaged(trained, tmp_path)
    (copy / "encoder" / "nlvr2" / "calibration.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"calibration.safetensors are missing"):
        Predictor(copy, device="cpu")
    asked = Predictor(copy, device="cpu", store=trained.root / "features" / "nlvr")
    record = trained.said["nlvr2"][0]
    assert asked(pictures(trained, record), record["text"]) == record["prediction"]


@pytest.mark.parametrize("content", ["{damaged", "{}", '{"extractor": 3, "tokens": 4, "dim": 512}', "[]"])
def test_a_damaged_record_of_features_is_named(content: str, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta.json (cannot be read|does not describe features)"):
        Predictor(trained.export, device="cpu", store=tmp_path)


def test_a_model_of_clips_is_refused(trained: Trained, tmp_path: Path) -> None:
    copy = damaged(trained, tmp_path)
    record = json.loads((copy / "pet_config.json").read_text())
    record["features"] = {"tvqa": record["features"]["vqa"]}
    (copy / "pet_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"was trained on tvqa, which are about clips"):
        Predictor(copy, device="cpu")


def test_other_weights_of_the_encoder_are_refused_before_they_are_read(trained: Trained, tmp_path: Path) -> None:
    copy = damaged(trained, tmp_path, pretrained="mine.pt", weights_sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match=r"weights were the file mine.pt: give it by --encoder_weights"):
        Predictor(copy, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"no file none.pt: give the encoder's weights mine.pt"):
        Predictor(copy, device="cpu", encoder_weights="none.pt")
    (tmp_path / "other.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"other.pt has other weights .* mine.pt \(000000000000"):
        Predictor(copy, device="cpu", encoder_weights=str(tmp_path / "other.pt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(trained: Trained) -> None:
    with pytest.raises(ValueError, match=r"device 'cuda:0': no GPU"):
        Predictor(trained.export, device="cuda:0")


def test_a_batch_answers_like_its_questions_one_by_one(trained: Trained, predictor: Predictor) -> None:
    records = trained.said["vqa"]
    images, questions = [pictures(trained, r) for r in records], [r["text"] for r in records]
    assert predictor(images, questions) == [predictor(i, q) for i, q in zip(images, questions, strict=True)]
    assert predictor(images, questions[0]) == [predictor(image, questions[0]) for image in images]
    small = Predictor(trained.export, device="cpu", batch_size=1)
    assert small(images, questions) == predictor(images, questions)


def test_several_answers_of_a_batch_are_those_of_its_questions(trained: Trained, predictor: Predictor) -> None:
    records = trained.said["caption"] + trained.said["caption"]
    images = [pictures(trained, record) for record in records]
    together = predictor(images, top=3)
    for image, answers in zip(images, together, strict=True):
        alone = predictor(image, top=3)
        assert [answer.text for answer in answers] == [answer.text for answer in alone]
        assert [a.probability for a in answers] == pytest.approx([a.probability for a in alone], rel=1e-3)


def test_one_answer_is_searched_as_in_an_evaluation(
    trained: Trained, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    beams: list[int] = []
    generate = predictor.model.generate

    def counted(batch: Any, **settings: Any) -> Any:
        beams.append(settings["num_beams"])
        return generate(batch, **settings)

    monkeypatch.setattr(predictor.model, "generate", counted)
    for name in ("vqa", "caption"):
        for top in (1, 2, 7):
            record = trained.said[name][0]
            predictor(pictures(trained, record), record["text"], top=top)
    assert beams == [1, 2, 7, 5, 5, 7]


def test_the_prompt_of_the_training_is_used(trained: Trained, predictor: Predictor) -> None:
    picture = pictures(trained, trained.said["vqa"][0])
    batch = predictor.batch(task("vqa"), [(picture,)], ["which color ?"])
    expected = predictor.tokenizer("what is which color ?").input_ids
    assert batch.input_ids.tolist() == [expected]


def test_a_picture_is_turned_as_its_features_were(trained: Trained, predictor: Predictor, tmp_path: Path) -> None:
    with Image.open(trained.pictures / "COCO" / f"{trained.said['vqa'][0]['images'][0]}.png") as image:
        image.save(tmp_path / "upright.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright, turned = predictor.encode([tmp_path / "upright.png", tmp_path / "turned.png"])
    assert torch.equal(upright, turned)


def test_the_example_of_the_documentation_runs(trained: Trained) -> None:
    text = (Predictor.__doc__ or "").replace("# doctest: +SKIP", "")
    names = {"folder": trained.export, "photo": pictures(trained, trained.said["vqa"][0])}
    example = doctest.DocTestParser().get_doctest(text, names, "Predictor", None, None)
    assert doctest.DocTestRunner().run(example) == (0, 7)


def test_a_picture_may_be_open_already(trained: Trained, predictor: Predictor) -> None:
    record = trained.said["vqa"][0]
    with Image.open(pictures(trained, record)) as image:
        assert predictor(image, record["text"]) == record["prediction"]


@pytest.mark.parametrize("kind", ["transparent", "deep", "turned"])
def test_an_open_picture_is_converted_like_its_file(kind: str, predictor: Predictor, tmp_path: Path) -> None:
    values, exif = np.random.default_rng(0).integers(0, 255, (40, 56, 4), dtype=np.uint8), Image.Exif()
    values[:20, :, 3] = 0
    picture = Image.fromarray(values)
    if kind == "deep":
        picture = Image.fromarray(values[..., 0].astype(np.uint16) * 20)
    elif kind == "turned":
        picture, exif[0x0112] = picture.convert("RGB"), 6
    picture.save(tmp_path / "picture.png", exif=exif)
    with Image.open(tmp_path / "picture.png") as opened:
        assert torch.equal(predictor.encode([opened]), predictor.encode([tmp_path / "picture.png"]))


def test_the_most_probable_answers_come_first(trained: Trained, predictor: Predictor) -> None:
    record = trained.said["vqa"][0]
    answers = predictor(pictures(trained, record), record["text"], top=4)
    chances = [answer.probability for answer in answers]
    assert chances == sorted(chances, reverse=True)
    assert len({answer.text for answer in answers}) == len(answers) > 1
    assert 0 < sum(chances) <= 1
    (single,) = predictor(pictures(trained, record), record["text"], top=1)
    assert single.text == record["prediction"]


def test_probabilities_are_products_over_tokens(trained: Trained, predictor: Predictor) -> None:
    record = trained.said["vqa"][1]
    batch = predictor.batch(task("vqa"), [(pictures(trained, record),)], [record["text"]])
    start, first, end = (predictor.model.lm.config.decoder_start_token_id, 0, 2)
    words = (5, 9, 11)
    ids = torch.tensor([[start, first, word, end, 1] for word in words])
    expected = []
    with torch.no_grad():
        for word in words:
            chance = 1.0
            sequence = [start, first, word, end]
            for place in range(1, 4):
                logits = predictor.model.decode(batch, torch.tensor([sequence[:place]]))[0, -1]
                chance *= float(logits.softmax(0)[sequence[place]])
            expected.append(chance)
    assert sequence_probabilities(predictor.model, batch, ids).tolist() == pytest.approx(expected, rel=1e-4)


def test_true_and_false_share_one(trained: Trained, predictor: Predictor) -> None:
    record = trained.said["nlvr2"][0]
    answers = predictor(pictures(trained, record), record["text"], top=5)
    assert {answer.text for answer in answers} == {"true", "false"}
    assert sum(answer.probability for answer in answers) == pytest.approx(1)
    assert answers[0].text == record["prediction"]


def test_a_checkpoint_answers_like_its_export(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    record = trained.said["vqa"][0]
    words = [
        "ask",
        record["text"],
        "--image",
        str(pictures(trained, record)),
        "--json",
        "--device",
        "cpu",
        "--top",
        "2",
    ]
    found = []
    for model in (trained.export, trained.checkpoint):
        capsys.readouterr()
        assert run([*words, "--model", str(model)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0][0]["question"] == record["text"]
    assert len(found[0][0]["answers"]) == 2


def test_a_table_of_questions_is_answered_in_its_order(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = list(itertools.chain(*zip(trained.said["vqa"], trained.said["nlvr2"], strict=True)))
    with (tmp_path / "questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "image2", "question"])
        for record in records:
            store = "nlvr" if len(record["images"]) == 2 else "COCO"
            names = [f"{store}/{name}.png" for name in record["images"]]
            writer.writerow([names[0], names[1] if len(names) == 2 else "", record["text"]])
    command = ["ask", "--model", str(trained.export), "--device", "cpu", "--images", str(trained.pictures)]
    command += ["--questions", str(tmp_path / "questions.csv"), "--out", str(tmp_path / "answers.csv")]
    assert run(command) == 0
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(newline="")))
    assert [row["answer"] for row in rows] == [record["prediction"] for record in records]
    assert [row["question"] for row in rows] == [record["text"] for record in records]


def test_features_of_another_extractor_are_refused_by_name(trained: Trained, tmp_path: Path) -> None:
    other = json.loads(RESNET.read_text())
    other["vision_cfg"]["width"] *= 2
    (tmp_path / "wide_rn.json").write_text(json.dumps(other))
    out = tmp_path / "store"
    source = trained.pictures / "nlvr"
    extract_images(source=source, out=out, model=str(tmp_path / "wide_rn.json"), pretrained=None, pool=2, device="cpu")
    with pytest.raises(ValueError, match=r"trained on tiny_rn .* has wide_rn .*model 'wide_rn' there, 'tiny_rn'"):
        Predictor(trained.export, store=out, device="cpu")


def damaged(trained: Trained, tmp_path: Path, **changes: Any) -> Path:
    """Copy the export with other records of its features."""
    copy = tmp_path / "export"
    shutil.copytree(trained.export, copy)
    record = json.loads((copy / "pet_config.json").read_text())
    for entry in record["features"].values():
        entry["extractor"].update(changes)
    (copy / "pet_config.json").write_text(json.dumps(record))
    return copy


def test_an_encoder_that_turned_out_differently_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mean .* there, \[0.0, 0.0, 0.0\] in training"):
        Predictor(damaged(trained, tmp_path, mean=[0.0, 0.0, 0.0]), device="cpu")


def test_missing_parts_of_the_encoder_are_named(trained: Trained, tmp_path: Path) -> None:
    copy = damaged(trained, tmp_path)
    for path in (copy / "encoder").rglob("tiny_rn.json"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"architecture tiny_rn\.json of the encoder is not in"):
        Predictor(copy, device="cpu")
    Predictor(copy, device="cpu", architecture=str(RESNET))
    (copy / "encoder" / "calibration.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"calibration.safetensors are missing"):
        Predictor(copy, device="cpu", architecture=str(RESNET))


def test_an_export_without_a_record_needs_the_store(trained: Trained, tmp_path: Path) -> None:
    copy = damaged(trained, tmp_path)
    record = json.loads((copy / "pet_config.json").read_text())
    del record["features"]
    (copy / "pet_config.json").write_text(json.dumps(record))
    shutil.rmtree(copy / "encoder")
    with pytest.raises(ValueError, match=r"does not record the features .*--store"):
        Predictor(copy, device="cpu")
    store = tmp_path / "COCO"
    shutil.copytree(trained.root / "features" / "COCO", store)
    question = trained.said["vqa"][0]
    asked = Predictor(copy, device="cpu", store=store)
    assert asked(pictures(trained, question), question["text"]) == question["prediction"]


@pytest.mark.parametrize(
    ("images", "question", "name", "message"),
    [
        (("a", "b", "c"), "x", None, "about 1 image"),
        (("a",), "x", "nlvr2", "about 2 image"),
        (("a",), " ", "vqa", "vqa needs a question"),
        (("a",), "x", "caption", "a caption answers no question, got 'x'"),
        (["a", "b"], ["x", ""], None, "a batch of caption and vqa"),
        (("a",), "x", "tvqa", "task 'tvqa' is about clips"),
        (("a",), "x", "gqa", "not trained on gqa"),
        (["a", "b"], ["x", "y", "z"], None, "2 images and 3 questions"),
        ([], "x", None, "0 images"),
    ],
)
def test_questions_that_do_not_fit_are_errors(
    images: Any, question: Any, name: str | None, message: str, predictor: Predictor
) -> None:
    with pytest.raises(ValueError, match=message):
        predictor(images, question, name)


def test_unreadable_images_are_named(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no image .*none.png"):
        predictor(tmp_path / "none.png", "what is it?")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png cannot be read"):
        predictor(tmp_path / "text.png", "what is it?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --image FILE, or --questions FILE"),
        (["--image", "none.png"], "there is no image none.png"),
        (["--questions", "none.csv"], "there is no file none.csv"),
        (["--questions", "none.csv", "--image", "x.png"], "give no --image"),
    ],
)
def test_options_that_do_not_fit_are_errors(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(["ask", "--model", "DIR", *words])


def test_a_question_that_is_cut_is_reported(
    trained: Trained, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = task("vqa").max_text or 0
    fits = next(n for n in range(limit, 0, -1) if not predictor.truncated(task("vqa"), ["red " * n]))
    assert len(predictor.tokenizer("what is " + "red " * fits).input_ids) == limit
    assert predictor.truncated(task("vqa"), ["red " * fits, "red " * (fits + 1)]) == [1]
    assert predictor.truncated(task("nlvr2"), ["red " * 100]) == []
    picture = str(pictures(trained, trained.said["vqa"][0]))
    for count in (fits, fits + 1):
        words = ["ask", "red " * count, "--image", picture, "--model", str(trained.export), "--device", "cpu", "--json"]
        assert run(words) == 0
        said = capsys.readouterr()
        json.loads(said.out)
        assert ("1 question(s) are truncated" in said.err) == (count > fits)


def test_no_question_is_answered_if_one_does_not_fit(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = f"{trained.said['vqa'][0]['images'][0]}.png"
    path = tmp_path / "q.csv"
    path.write_text("image,question\n" + f"{image},what?\n" * 40 + f"{image},\n")
    monkeypatch.setattr(Predictor, "encode", lambda *_: pytest.fail("a picture was encoded"))
    words = ["ask", "--model", str(trained.export), "--device", "cpu", "--task", "vqa", "--questions", str(path)]
    with pytest.raises(ValueError, match="vqa needs a question"):
        run([*words, "--images", str(trained.pictures / "COCO")])


def test_a_checkpoint_whose_features_are_gone_needs_a_store(trained: Trained, tmp_path: Path) -> None:
    picture = str(pictures(trained, trained.said["vqa"][0]))
    words = ["ask", "what?", "--image", picture, "--model", str(trained.checkpoint), "--device", "cpu"]
    features, gone = trained.root / "features", trained.root / "gone"
    features.rename(gone)
    try:
        with pytest.raises(ValueError, match=r"run of .*last\.ckpt was trained on are not where .* --store"):
            run(words)
        assert run([*words, "--store", str(gone / "COCO")]) == 0
    finally:
        gone.rename(features)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,question\n,what?\n", "question 1 has no image"),
        (b"question,image\nwhat?\n", "question 1 has no image"),
        (b"image,question\na.png,caf\xe9\n", "is not in UTF-8"),
        (b"image,question\n", "has no question"),
    ],
)
def test_a_damaged_table_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(["ask", "--model", "DIR", "--questions", str(tmp_path / "q.csv")])


def test_a_table_without_columns_or_images_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("picture,question\na.png,what?\n")
    with pytest.raises(ValueError, match=r"no column image.*it reads picture, question"):
        run(["ask", "--model", "DIR", "--questions", str(path)])
    path.write_text("image,question\na.png,what?\nb.png,what?\n")
    with pytest.raises(FileNotFoundError, match=r"2 images of .* are missing: .*a.png"):
        run(["ask", "--model", "DIR", "--questions", str(path), "--images", str(tmp_path)])
