"""The rendered world: the benchmark's formats, disjoint splits, reproducible by seed."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_modules.annotations.image_text import read_split
from data_modules.world.benchmark import soft_label
from data_modules.world.synthetic import RECORD, STARTED, synthetic
from vlpet_lightning.__main__ import run
from vlpet_lightning.tasks import IMAGE_TEXT, TASKS

IMAGES = 800
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "w"
    synthetic(out, seed=3, images=IMAGES)
    return out


def test_every_split_of_every_task_is_read(world):
    for name in IMAGE_TEXT:
        for split in SPLITS:
            samples = read_split(world, TASKS[name], split)
            assert len(samples) >= 8
            store = world / "images" / TASKS[name].splits[split].features
            assert all((store / f"{id}.png").is_file() for images in samples.images for id in images)


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_no_image_is_in_two_splits(world, name):
    images = {split: {i for row in read_split(world, TASKS[name], split).images for i in row} for split in SPLITS}
    assert not images["train"] & (images["val"] | images["test"])
    if name != "gqa":  # whose testdev is both, as in the benchmark
        assert not images["val"] & images["test"]


def test_a_question_has_ten_answers_and_its_soft_label_follows_from_them(world):
    samples = read_split(world, TASKS["vqa"], "val")
    for reference in samples.references:
        assert len(reference["answers"]) == 10
        assert reference["label"] == soft_label(reference["answers"])
    assert any(len(reference["label"]) > 1 for reference in samples.references)


def test_soft_labels_are_those_of_the_benchmark():
    assert soft_label(["a"] * 6 + ["b"] * 3 + ["c"]) == pytest.approx({"a": 1.0, "b": 0.9, "c": 0.3})


def test_nlvr2_statements_go_with_four_pairs_half_of_them_true(world):
    records = json.loads((world / "nlvr/train.json").read_text())
    groups = {}
    for record in records:
        split, group, _, sentence = record["identifier"].split("-")
        groups.setdefault((split, group, sentence), []).append(record)
    for members in groups.values():
        assert len({record["sent"] for record in members}) == 1
        assert sorted(record["label"] for record in members) == [0, 0, 1, 1]


def test_captions_follow_karpathys_file(world):
    images = json.loads((world / "COCO/dataset_coco.json").read_text())["images"]
    assert set(Counter(image["split"] for image in images)) == {"train", "restval", "val", "test"}
    for image in images:
        assert len(image["sentences"]) == len(image["sentids"]) == 5
        assert image["filename"].startswith(f"COCO_{image['filepath']}_")
        assert image["filepath"] == "train2014" or image["split"] != "train"


def test_the_text_has_every_task_with_its_prompt_and_no_image(world):
    pairs = [json.loads(line) for line in (world / "text/val.jsonl").read_text().splitlines()]
    assert {pair["kind"] for pair in pairs} == set(IMAGE_TEXT)
    assert all(pair["source"].startswith(TASKS[pair["kind"]].prompt) and pair["target"] for pair in pairs)


def test_images_are_pictures(world):
    found = list((world / "images").rglob("*.png"))
    assert 0.97 * IMAGES < len(found) <= IMAGES  # splits are rounded down to pairs
    assert Image.open(found[0]).size == (128, 128)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_seed_gives_the_same_world_and_another_seed_another(world, tmp_path):
    synthetic(tmp_path / "same", seed=3, images=IMAGES)
    synthetic(tmp_path / "other", seed=4, images=IMAGES)
    assert files_of(tmp_path / "same") == files_of(world)
    other = files_of(tmp_path / "other")
    assert any(other[name] != content for name, content in files_of(world).items() if name.name == "testdev.json")


def test_a_finished_world_is_left_as_it_is(world, capsys):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    synthetic(world, seed=3, images=IMAGES)
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_another_world_is_not_overwritten(world):
    with pytest.raises(FileExistsError, match=r"holds another world.*choose another --out"):
        synthetic(world, seed=5, images=IMAGES)


def test_other_data_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other data"):
        synthetic(tmp_path, images=IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_world_that_was_cut_short_is_made_again(world, tmp_path):
    out = tmp_path / "w"
    synthetic(out, seed=3, images=IMAGES)
    (out / RECORD).rename(out / STARTED)  # as if killed before the end
    (out / "GQA/testdev.json").unlink()
    synthetic(out, seed=3, images=IMAGES)
    assert files_of(out) == files_of(world)


def test_too_few_images_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="a world needs 800 images or more"):
        synthetic(tmp_path / "w", images=50)
    assert not (tmp_path / "w").exists()


def test_help_says_how_many_images_are_the_least(capsys):
    with pytest.raises(SystemExit):
        run(["data", "synthetic", "--help"])
    assert "800 or more" in " ".join(capsys.readouterr().out.split())


def test_too_few_images_are_refused_before_torch_is_imported(tmp_path):
    code = f"""
import sys
from vlpet_lightning.__main__ import run
try:
    run(["data", "synthetic", "--out", {str(tmp_path / "world")!r}, "--images", "150"])
except ValueError as error:
    print(error)
print({{"torch", "lightning", "transformers"}} & set(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    refusal, imported = ran.stdout.splitlines()
    assert "150" in refusal
    assert imported == "set()"
