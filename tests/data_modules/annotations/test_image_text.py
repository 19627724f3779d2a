import json

import pytest

from data_modules.annotations.image_text import READERS, AnnotationError, read_split
from tests.data_modules.tiny_data import coco, vqa_record, write_json, write_world
from vlpet_lightning.tasks import IMAGE_TEXT, TASKS


@pytest.fixture
def root(tmp_path):
    write_world(tmp_path)
    return tmp_path


def read(root, task, split, **options):
    return read_split(root, TASKS[task], split, **options)


def test_every_image_text_task_has_a_reader():
    assert set(IMAGE_TEXT) <= set(READERS)


def test_a_vqa_question_has_scored_answers_and_ten_human_ones(root):
    train, val = read(root, "vqa", "train"), read(root, "vqa", "val")
    assert train.ids == [str(i) for i in range(7)]
    assert train.images[2] == (coco(2),)
    assert train.texts[2] == "What colour is thing 2?"
    assert train.answers[4:6] == ["blue", "red"]
    assert train.scores[4:6].tolist() == pytest.approx([1.0, 0.3])
    assert train.offsets.tolist() == [2 * i for i in range(8)]
    assert train.references == []
    assert val.references[0] == {
        "answers": ["green"] * 9 + ["blue"],
        "label": {"green": 1.0, "blue": 0.3},
        "answer_type": "other",
        "question_type": "what colour is",
    }


def test_human_answers_that_lie_in_the_train_file_are_found(root):
    path = root / "vqa/v2_mscoco_val2014_annotations.json"
    records = json.loads(path.read_text())["annotations"]
    write_json(path, {"annotations": records[:8]})
    write_json(root / "vqa/v2_mscoco_train2014_annotations.json", {"annotations": records[8:]})
    assert all(len(reference["answers"]) == 10 for reference in read(root, "vqa", "val").references)


def test_gqa_trains_on_train_and_valid_and_is_evaluated_on_testdev(root):
    assert read(root, "gqa", "train").ids == [f"g{i}" for i in range(9)]
    testdev = read(root, "gqa", "val")
    assert testdev.ids == ["g50", "g51", "g52", "g53"]
    assert testdev.references[1] == {"label": {"right": 1.0}}


def test_nlvr2_has_two_images_and_true_or_false(root):
    train, test = read(root, "nlvr2", "train"), read(root, "nlvr2", "test")
    assert train.images[3] == ("train-3-img0", "train-3-img1")
    assert train.answers[:2] == ["false", "true"]
    assert test.references[1] == {"label": "true", "identifier": "test-1-0-0"}


def test_captions_train_on_every_reference_and_are_evaluated_once_an_image(root):
    train, val = read(root, "caption", "train"), read(root, "caption", "val")
    assert len(train) == 7 * 2  # restval images count as training images
    assert train.ids[:2] == [f"{coco(0)}#0", f"{coco(0)}#1"]
    assert train.answers[:2] == ["A red thing.", "A green thing."]
    assert train.texts[0] == ""
    assert len(val) == 4
    assert len(val.references[0]["captions"]) == 2
    assert val.answers == []


def test_files_are_also_found_below_annotations(root):
    (root / "annotations").mkdir()
    (root / "nlvr").rename(root / "annotations/nlvr")
    assert len(read(root, "nlvr2", "train")) == 7


def test_a_limit_takes_the_first_rows(root):
    assert read(root, "gqa", "train", limit=3).ids == ["g0", "g1", "g2"]


def test_a_missing_file_is_named_with_the_tree_and_the_commands_that_bring_it(root):
    (root / "GQA/valid.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"GQA/valid\.json") as error:
        read(root, "gqa", "train")
    for part in ("karpathy_train.json", "data synthetic --out", "vlpet_lightning data download --out DIR"):
        assert part in str(error.value)


def test_truncated_json_is_named(root):
    path = root / "vqa/karpathy_train.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(AnnotationError, match=r"karpathy_train\.json is not valid JSON"):
        read(root, "vqa", "train")


@pytest.mark.parametrize(("task", "file"), [("vqa", "vqa/karpathy_train.json"), ("caption", "COCO/dataset_coco.json")])
def test_a_file_without_a_list_is_named(root, task, file):
    write_json(root / file, {"something": 1})
    with pytest.raises(AnnotationError, match="has no list of records"):
        read(root, task, "train")


@pytest.mark.parametrize(
    ("task", "file", "field"),
    [
        ("vqa", "vqa/karpathy_train.json", "img_id"),
        ("gqa", "GQA/train.json", "sent"),
        ("nlvr2", "nlvr/train.json", "img1"),
    ],
)
def test_a_missing_field_is_named_with_file_and_record(root, task, file, field):
    records = json.loads((root / file).read_text())
    del records[1][field]
    write_json(root / file, records)
    with pytest.raises(AnnotationError, match=rf"{file}, record 1: the field '{field}' is missing"):
        read(root, task, "train")


@pytest.mark.parametrize("name", ["vqa/karpathy_train.json", "vqa/v2_mscoco_val2014_annotations.json"])
def test_a_record_that_is_no_object_is_named(root, name):
    content = json.loads((root / name).read_text())
    (content if isinstance(content, list) else content["annotations"]).insert(0, 7)
    write_json(root / name, content)
    with pytest.raises(AnnotationError, match=rf"{name}, record 0 must be a JSON object, got '7': fetch it again"):
        read(root, "vqa", "train" if "train" in name else "val")


@pytest.mark.parametrize("label", [None, {"red": -1}, {"red": "high"}, {"red": float("nan")}])
def test_a_label_that_is_no_table_of_scores_is_refused(root, label):
    write_json(root / "vqa/karpathy_train.json", [vqa_record(0, coco(0)) | {"label": label}])
    with pytest.raises(AnnotationError, match="record 0"):
        read(root, "vqa", "train")


def test_an_nlvr2_label_other_than_0_and_1_is_refused(root):
    records = json.loads((root / "nlvr/train.json").read_text())
    write_json(root / "nlvr/train.json", [*records, records[0] | {"uid": "x", "label": 2}])
    with pytest.raises(AnnotationError, match="record 7: label must be 0 or 1, got 2"):
        read(root, "nlvr2", "train")


def test_an_empty_split_is_named(root):
    write_json(root / "vqa/karpathy_test.json", [])
    with pytest.raises(AnnotationError, match="the test split of vqa is empty"):
        read(root, "vqa", "test")


def test_a_question_id_that_comes_twice_is_named(root):
    write_json(root / "vqa/karpathy_train.json", [vqa_record(i, coco(i)) for i in (0, 1, 1)])
    with pytest.raises(AnnotationError, match=r"1 question ids of vqa come twice .*: 1"):
        read(root, "vqa", "train")


def test_questions_without_human_answers_are_counted(root):
    write_json(root / "vqa/v2_mscoco_val2014_annotations.json", {"annotations": []})
    write_json(root / "vqa/v2_mscoco_train2014_annotations.json", {"annotations": []})
    with pytest.raises(AnnotationError, match="4 VQA questions have no human answers"):
        read(root, "vqa", "val")
