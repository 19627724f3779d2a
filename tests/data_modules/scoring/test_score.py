"""The ``score`` command: formats of predictions and annotations, and ids that do not match."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_modules.annotations.records import AnnotationError
from data_modules.scoring.answers import ScoringError
from data_modules.scoring.scores import score_task
from data_modules.scoring.truths import read_truths
from vlpet_lightning.__main__ import run
from vlpet_lightning.prediction_files import as_json
from vlpet_lightning.submissions import FORMATS


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def scored(capsys: pytest.CaptureFixture[str], task: str, predictions: Path, *more: str) -> dict[str, Any]:
    assert run(["score", "--task", task, "--predictions", str(predictions), "--json", *more]) == 0
    return dict(json.loads(capsys.readouterr().out))


def vqa_files(folder: Path) -> list[str]:
    official = [
        {
            "question_id": id,
            "question_type": "what",
            "answer_type": kind,
            "answers": [{"answer": answer, "answer_id": i} for i in range(10)],
        }
        for id, answer, kind in ((1, "yes", "yes/no"), (2, "two", "number"), (3, "a dog", "other"))
    ]
    processed = [{"question_id": id, "label": {"yes": 1.0}, "img_id": "i", "sent": "?"} for id in (1, 2)]
    write(folder / "official.json", {"info": {}, "annotations": official})
    write(folder / "processed.json", processed)
    return ["--annotations", str(folder / "processed.json"), str(folder / "official.json")]


def test_vqa_scores_the_questions_of_the_processed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = vqa_files(tmp_path)
    said = write(tmp_path / "said.json", [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": "3"}])
    result = scored(capsys, "vqa", said, *annotations)
    assert result["questions"] == 2
    assert result["scores"] == {"accuracy": 50.0, "accuracy_original": 50.0, "soft_score": 50.0}
    assert result["groups"]["answer type"] == {
        "number": {"score": 0.0, "questions": 1},
        "yes/no": {"score": 100.0, "questions": 1},
    }
    assert set(result["protocol"]["annotations"]) == {"processed.json", "official.json"}


def test_our_own_files_score_like_the_servers_and_keep_their_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = vqa_files(tmp_path)
    records = [{"question_id": str(id), "prediction": "yes", "reference": None} for id in (1, 2)]
    ours = write(tmp_path / "test_vqa.json", as_json(records, {"protocol": "original"}))
    older = write(tmp_path / "older.json", records)
    server = write(tmp_path / "submission.json", FORMATS["vqa"].write(records))
    results = [scored(capsys, "vqa", path, *annotations) for path in (ours, older, server)]
    assert [result["scores"] for result in results] == [results[0]["scores"]] * 3
    assert [result["protocol"]["run"] for result in results] == [{"protocol": "original"}, {}, {}]


@pytest.mark.parametrize("task", ["gqa", "nlvr2", "caption", "tvqa", "tvc"])
def test_every_format_of_a_server_can_be_scored(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: dict[str, tuple[list[dict[str, Any]], str, Any]] = {
        "gqa": (
            [{"question_id": "07", "prediction": "left", "reference": None}],
            "testdev.json",
            [{"question_id": "07", "label": {"left": 1.0}}],
        ),
        "nlvr2": (
            [
                {"question_id": f"u{i}", "prediction": "true", "reference": {"identifier": f"dev-1-{i}-0"}}
                for i in range(2)
            ],
            "valid.json",
            [{"uid": f"u{i}", "identifier": f"dev-1-{i}-0", "label": 1} for i in range(2)],
        ),
        "caption": (
            [
                {"question_id": f"COCO_val2014_{i:012}", "prediction": text, "reference": None}
                for i, text in ((4, "a red dog"), (5, "two men"))
            ],
            "captions_val2014.json",
            {
                "images": [{"id": 4}, {"id": 5}],
                "annotations": [{"image_id": 4, "caption": "a red dog"}, {"image_id": 5, "caption": "two men"}],
            },
        ),
        "tvqa": (
            [{"question_id": "11", "prediction": "a4", "reference": None}],
            "tvqa_val_solution.json",
            {"split": "tvqa_val", "solution": {"Castle": {"11": 4}}},
        ),
        "tvc": (
            [
                {"question_id": str(clip), "prediction": text, "images": ["v"], "reference": None}
                for clip, text in ((7, "a man sits"), (8, "she leaves now"))
            ],
            "tvc_val.jsonl",
            '{"clip_id": 7, "descs": [{"desc": "a man sits"}]}\n'
            '{"clip_id": 8, "descs": [{"desc": "she leaves now"}]}\n',
        ),
    }
    records, name, annotations = cases[task]
    more = ["--annotations", str(write(tmp_path / name, annotations))]
    if task in ("caption", "tvc"):
        more += ["--metrics", "rouge_l"]
    ours = write(tmp_path / "ours.json", as_json(records))
    server = write(tmp_path / f"server.{FORMATS[task].suffix}", FORMATS[task].write(records))
    first, second = (scored(capsys, task, path, *more) for path in (ours, server))
    assert first["scores"] == second["scores"]
    assert set(first["scores"].values()) == {100.0}
    if task == "tvqa":
        assert first["groups"]["show"] == {"Castle": {"score": 100.0, "questions": 1}}


def test_captions_of_a_karpathy_split_only(tmp_path: Path) -> None:
    images = [
        {"split": split, "filename": f"COCO_val2014_{i:012}.jpg", "sentences": [{"raw": f"caption {i}"}]}
        for i, split in enumerate(("train", "restval", "val", "test", "test"))
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": images})
    assert list(read_truths("caption", [path]).references) == ["3", "4"]
    assert list(read_truths("caption", [path], "val").references) == ["2"]
    with pytest.raises(AnnotationError, match=r"no reference of caption \(split dev\)"):
        read_truths("caption", [path], "dev")


def test_ids_that_do_not_match_are_one_error_that_counts_them(tmp_path: Path) -> None:
    annotations = vqa_files(tmp_path)
    said = write(tmp_path / "said.json", [{"question_id": id, "answer": "yes"} for id in (2, 2, 8, 9)])
    command = ["score", "--task", "vqa", "--predictions", str(said), *annotations]
    with pytest.raises(ScoringError) as error:
        run(command)
    message = str(error.value)
    assert "1 ids that come more than once: 2" in message
    assert "1 questions without a prediction: 1" in message
    assert "2 predictions of unknown questions: 8, 9" in message


def test_partial_scores_what_is_there_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = vqa_files(tmp_path)
    said = write(tmp_path / "said.json", [{"question_id": id, "answer": "yes"} for id in (1, 9)])
    with pytest.raises(ScoringError, match="add --partial"):
        run(["score", "--task", "vqa", "--predictions", str(said), *annotations])
    result = scored(capsys, "vqa", said, *annotations, "--partial")
    assert result["questions"] == 1
    assert result["scores"]["accuracy"] == 100.0
    assert result["partial"] == ["1 questions without a prediction: 2", "1 predictions of unknown questions: 9"]


def test_an_id_with_two_predictions_is_an_error_even_in_a_partial_scoring(tmp_path: Path) -> None:
    annotations = vqa_files(tmp_path)
    said = write(tmp_path / "said.json", [{"question_id": 1, "answer": answer} for answer in ("yes", "no")])
    with pytest.raises(ScoringError, match="1 ids that come more than once: 1"):
        run(["score", "--task", "vqa", "--predictions", str(said), *annotations, "--partial"])


def test_compressed_annotations_and_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vqa_files(tmp_path)
    annotations = []
    for name in ("processed.json", "official.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        annotations.append(str(tmp_path / f"{name}.gz"))
    said = json.dumps([{"question_id": id, "answer": "yes"} for id in (1, 2)]).encode()
    (tmp_path / "said.json.gz").write_bytes(gzip.compress(said))
    result = scored(capsys, "vqa", tmp_path / "said.json.gz", "--annotations", *annotations)
    assert result["scores"]["accuracy"] == 50.0
    (tmp_path / "processed.json.gz").write_bytes(gzip.compress(b"[1]" * 1000)[:20])
    with pytest.raises(AnnotationError, match="not a complete gzip file"):
        scored(capsys, "vqa", tmp_path / "said.json.gz", "--annotations", *annotations)


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = vqa_files(tmp_path)
    said = write(tmp_path / "said.json", [{"question_id": id, "answer": "yes"} for id in (1, 2)])
    run(["score", "--task", "vqa", "--predictions", str(said), *annotations])
    out = capsys.readouterr().out
    assert "vqa: 2 questions" in out
    assert "50.00" in out
    assert "accuracy by answer type" in out


@pytest.mark.parametrize(
    ("task", "annotations", "message"),
    [
        ("vqa", [{"question_id": 1}], "the field 'label' is missing"),
        ("nlvr2", [{"identifier": "dev-1-0-0", "label": "maybe"}], "label must be True or False, is 'maybe'"),
        ("tvqa", [{"qid": 1, "answer_idx": 5}], "answer_idx must be one of 0 to 4, is 5"),
        ("gqa", {"1": {"question": "?"}}, "question 1 has no 'answer'"),
        ("caption", {"licenses": []}, "no list of records, neither at its top nor under 'images' or 'annotations'"),
        ("vqa", [], "no reference of vqa"),
    ],
)
def test_bad_annotations_are_named(task: str, annotations: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_truths(task, [write(tmp_path / "file.json", annotations)])


def test_human_answers_of_another_split_are_missed(tmp_path: Path) -> None:
    vqa_files(tmp_path)
    more = write(tmp_path / "more.json", [{"question_id": 77, "label": {"yes": 1.0}}])
    with pytest.raises(AnnotationError, match=r"1 of 1 questions have no human answers .* 77"):
        read_truths("vqa", [more, tmp_path / "official.json"])


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ScoringError, match="0 of 0 predictions"):
        score_task("vqa", {}, {})
