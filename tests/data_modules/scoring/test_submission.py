"""``submission check`` and ``submission pack``."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data_modules.scoring.submission import check, pack
from vlpet_lightning.__main__ import run
from vlpet_lightning.submissions import FORMATS, SubmissionError
from vlpet_lightning.submissions.servers import SERVERS


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def questions(folder: Path, *ids: int) -> Path:
    return write(folder / "questions.json", {"questions": [{"question_id": id, "question": "?"} for id in ids]})


def test_a_complete_file_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "r.json", [{"question_id": id, "answer": "yes"} for id in (1, 2)])
    assert run(["submission", "check", str(file), "--task", "vqa", "--questions", str(questions(tmp_path, 1, 2))]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "every question is answered" in out
    assert "test-standard: 1 a day and 5 in all" in out


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    answers = [(1, "yes"), (1, "no"), (3, " "), (9, "x")]
    file = write(tmp_path / "r.json", [{"question_id": id, "answer": text} for id, text in answers])
    with pytest.raises(SubmissionError) as error:
        check(file, "vqa", questions(tmp_path, 1, 2, 3))
    for problem in (
        "1 ids that come more than once: 1",
        "1 questions without an answer: 2",
        "1 answers to unknown questions: 9",
        "1 empty answers",
    ):
        assert problem in str(error.value)


def test_without_questions_only_the_number_is_compared(tmp_path: Path) -> None:
    file = write(tmp_path / "yc2c_test_predictions.jsonl", '{"clip_id": 1, "descs": [{"desc": "stir"}]}\n')
    with pytest.raises(SubmissionError, match="1 answers, and the split has 1,604 questions"):
        check(file, "yc2c")


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("vqa", "r.json", [{"question_id": "1", "answer": "yes"}], "'question_id' must be a number, is '1'"),
        ("vqa", "r.json", [{"question_id": 1}], "entry 0 has no 'answer'"),
        ("vqa", "r.json", {"1": "yes"}, "must be a JSON list, is dict"),
        ("vqa", "r.json", "[{", "is not valid JSON"),
        ("vqa", "r.txt", [], "the suffix for vqa is .json"),
        ("gqa", "r.json", [{"questionId": 1, "prediction": "yes"}], "'questionId' must be a string, is 1"),
        ("nlvr2", "r.csv", "dev-1-0-0;True\n", "line 1 must read identifier,True"),
        ("caption", "r.json", [{"image_id": "COCO_1", "caption": "x"}], "'image_id' must be a number"),
        ("tvqa", "r.json", {"1": "2"}, "the answer to '1' must be the number of a choice, is '2'"),
        ("tvqa", "r.json", {"1": 5}, "1 answers that are none of the 5 choices: 1"),
        ("tvqa", "r.json", '{"1": 2, "1": 3}', "1 ids that come more than once: 1"),
        ("tvc", "r.jsonl", '{"clip_id": 1, "descs": []}\n', '"descs" must hold'),
        ("how2qa", "r.json", {"1": -1}, "1 empty answers"),
        ("vqa", "r.zip", "", "wants the json file itself, no zip"),
        ("tvc", "r.zip", "", "is not a complete zip archive"),
    ],
)
def test_what_a_server_would_refuse(task: str, name: str, content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match=message):
        check(write(tmp_path / name, content), task)


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    file = write(tmp_path / "r.json", [])
    with pytest.raises(ValueError, match="unknown split 'test' of vqa: choose from test2015, test-dev2015"):
        check(file, "vqa", split="test")
    with pytest.raises(ValueError, match="unknown task 'okvqa'"):
        check(file, "okvqa")


def record(id: str, text: str) -> dict[str, Any]:
    return {"question_id": id, "prediction": text, "images": ["v1"], "reference": None}


def test_values_archive_has_the_layout_of_the_sample_submission(tmp_path: Path) -> None:
    for stage in ("val", "predict"):
        for task, text in (("tvqa", "a1"), ("yc2c", "stir the pan")):
            content = FORMATS[task].write([record("5", text)])
            write(tmp_path / "predictions" / f"{stage}_{task}_submission.{FORMATS[task].suffix}", content)
    pack(tmp_path / "predictions", tmp_path / "value.zip")
    with zipfile.ZipFile(tmp_path / "value.zip") as archive:
        assert sorted(archive.namelist()) == [
            "tvqa/tvqa_test_predictions.json",
            "tvqa/tvqa_val_predictions.json",
            "yc2c/yc2c_test_predictions.jsonl",
            "yc2c/yc2c_val_predictions.jsonl",
        ]
        assert json.loads(archive.read("tvqa/tvqa_val_predictions.json")) == {"5": 1}
    clips = write(tmp_path / "clips.jsonl", '{"clip_id": 5}\n')
    with pytest.raises(SubmissionError, match=r"yc2c_val_predictions\.jsonl: 1 answers, and the split has 3,492"):
        check(tmp_path / "value.zip", "yc2c", clips, split="test")  # the test split itself is complete
    with pytest.raises(ValueError, match="--questions is of one split"):
        check(tmp_path / "value.zip", "yc2c", clips)


def test_an_archive_needs_both_splits(tmp_path: Path) -> None:
    write(tmp_path / "val_how2qa_submission.json", FORMATS["how2qa"].write([record("5", "a1")]))
    with pytest.raises(FileNotFoundError, match="how2qa test_public"):
        pack([tmp_path], tmp_path / "value.zip")
    assert not (tmp_path / "value.zip").exists()
    with pytest.raises(FileNotFoundError, match="no result files of caption"):
        pack([tmp_path], tmp_path / "coco.zip", "caption")


def test_cocos_archive_has_the_names_of_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("val", "test"):
        content = FORMATS["caption"].write([record("COCO_val2014_000000000042", "a dog")])
        write(tmp_path / f"{stage}_caption_submission.json", content)
    pack([tmp_path], tmp_path / "coco.zip", "caption", name="vlpet_large")
    monkeypatch.setitem(SERVERS["caption"].splits, "val2014", 1)
    monkeypatch.setitem(SERVERS["caption"].splits, "test2014", 1)
    check(tmp_path / "coco.zip", "caption")
    with zipfile.ZipFile(tmp_path / "coco.zip") as archive:
        assert json.loads(archive.read("captions_test2014_vlpet_large_results.json"))[0]["image_id"] == 42


def test_an_enclosing_folder_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "value.zip", "w") as archive:
        archive.writestr("mine/tvqa/tvqa_val_predictions.json", "{}")
    with pytest.raises(SubmissionError, match=r"without an enclosing folder; it has: mine/tvqa"):
        check(tmp_path / "value.zip", "tvqa")


def test_own_ids_are_refused_where_the_server_needs_numbers() -> None:
    with pytest.raises(SubmissionError, match="'q7' is no number"):
        FORMATS["vqa"].write([record("q7", "yes")])
    with pytest.raises(SubmissionError, match="'dog' is no COCO image"):
        FORMATS["caption"].write([record("dog", "a dog")])


@pytest.mark.parametrize("task", sorted(FORMATS))
def test_what_is_written_is_read_again(task: str) -> None:
    text = {"nlvr2": "true", "tvqa": "a3", "how2qa": "a0"}.get(task, "a dog, a cat")
    content = FORMATS[task].write([record("17", text)])
    assert FORMATS[task].read(content.encode(), "file") == [("17", text)]
