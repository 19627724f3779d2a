"""Questions of evaluation servers, from their files to the result file of ``predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_modules import ImageTextDataModule
from data_modules.annotations.records import AnnotationError
from data_modules.annotations.server_questions import read_questions
from tests.data_modules.tiny_data import DIM, write_world

VQA = {
    "data_subtype": "test-dev2015",
    "questions": [{"question_id": 7, "image_id": 42, "question": "What is it?"}],
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("task", "content", "expected"),
    [
        ("vqa", VQA, ("7", "What is it?", ("COCO_test2015_000000000042",))),
        ("gqa", {"011": {"imageId": "n5", "question": "Is it red?"}}, ("011", "Is it red?", ("n5",))),
        (
            "nlvr2",
            '{"identifier": "test1-1-0-1", "sentence": "Two dogs."}\n',
            ("test1-1-0-1", "Two dogs.", ("test1-1-0-img0", "test1-1-0-img1")),
        ),
        (
            "caption",
            {"images": [{"id": 1, "file_name": "COCO_test2014_000000000001.jpg"}]},
            ("COCO_test2014_000000000001", "", ("COCO_test2014_000000000001",)),
        ),
    ],
)
def test_every_servers_file_gives_questions_and_images(
    task: str, content: Any, expected: tuple[str, str, tuple[str, ...]], tmp_path: Path
) -> None:
    samples = read_questions(task, write(tmp_path / "questions.json", content))
    assert (samples.ids[0], samples.texts[0], samples.images[0]) == expected
    assert len(samples) == 1
    assert samples.references == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"questions": []}, "the field 'data_subtype' is missing"),
        ({"data_subtype": "test2015", "questions": []}, "has no question"),
        ("[1", "is not a question file of vqa"),
        ([], "is not a question file of vqa"),
    ],
)
def test_other_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_questions("vqa", write(tmp_path / "questions.json", content))


def test_predict_answers_the_servers_questions_and_test_its_own(tmp_path: Path, tiny_backbone: Path) -> None:
    write_world(tmp_path)
    questions = write(tmp_path / "questions.json", {**VQA, "data_subtype": "val2014"})
    image = "COCO_val2014_000000000001"  # has features
    content = json.loads(questions.read_text())
    content["questions"][0]["image_id"] = 1
    write(questions, content)
    data = ImageTextDataModule(
        str(tmp_path), str(tiny_backbone), ["vqa"], 2, 2, feature_dim=DIM, predict_questions={"vqa": str(questions)}
    )
    data.setup("test")
    assert len(data.datasets["test"].tasks["vqa"]) == 4
    data.setup("predict")
    (batch,) = list(data.predict_dataloader())
    assert batch.ids == ["7"]
    assert batch.images == [(image,)]
    assert batch.references == []
    (record,) = data.provenance("predict")["splits"]["test"].values()
    assert record["part"] == "questions of a server"
    assert list(record["annotations"]) == ["questions.json"]
    assert record["samples"] == 1


def test_tasks_without_question_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no question files of tvqa"):
        ImageTextDataModule(str(tmp_path), "x", ["vqa"], 2, 2, predict_questions={"tvqa": "x"})
